# SPDX-License-Identifier: Apache-2.0
"""
Make `requests/<task>/{train,validation,test}.jsonl.gz`: short requests whose answer is a word, a number or a quote.

    PEFT_SVF_DATA=<folder with the full files> python examples/data/make_requests.py

The test split has templates, names, products and numbers of its own, so that no phrase can be learned by heart. Lines
are those of `peft_svf.tasks.jsonl_task`: a text is right if it is the answer, apart from case, spaces and a full stop,
or if it ends with the right number.
"""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

from peft_svf.tasks import get_task
from peft_svf.tasks.task import Record, shuffled

HERE = Path(__file__).parent / "requests"
COUNTS = {"train": 320, "validation": 64, "test": 240}
Pair = tuple[str, str]  # prompt, answer
Row = dict[str, str]  # prompt, answer, and a solution where that is more than the answer


def compare(held_out: bool, draw: random.Random) -> Pair:
    """Ask for the larger of two numbers; the test's have an odd sum."""
    a, b = 0, 0
    while a == b or (a + b) % 2 != held_out:
        a, b = (draw.randrange(*draw.choice([(10, 100), (100, 1000), (1000, 10000)])) for _ in range(2))
    template = draw.choice(
        [
            "What is the higher number, {a} or {b}? Reply with only that number.",
            "Shop A sold {a} tickets and shop B sold {b}. What is the bigger number? Give the number alone.",
            "Name the greater one: {a}, {b}. No other words.",
        ]
        if held_out
        else [
            "Which number is larger, {a} or {b}? Answer with the number only.",
            "{a} or {b}: which one is more? Just the number, please.",
            "Tell me the bigger of the two numbers {a} and {b}. Only the number.",
            "I have {a} in one box and {b} in the other. Which is the larger number? Answer with one number.",
            "Compare {a} and {b}. Write down the larger number, nothing else.",
        ]
    )
    return template.format(a=a, b=b), str(max(a, b))


GOOD = {
    False: [
        "I love it", "it works perfectly", "the best I have ever had", "we were delighted", "great value for money",
        "I would buy it again", "everything was wonderful", "it exceeded my expectations", "superb quality",
        "my family adores it", "I can't recommend it enough", "no complaints at all",
        "a pleasure from start to finish", "fast, friendly and fair", "it made my day", "worth every penny",
    ],
    True: [
        "what a lovely surprise", "I could not be happier", "five stars from me", "it never let me down",
        "a real joy", "exactly what I had hoped for", "we will come back soon", "simply brilliant",
        "I smiled all evening", "nothing to improve", "it saved my holiday", "beautifully made",
    ],
}  # fmt: skip
BAD = {
    False: [
        "I hate it", "it broke after two days", "the worst I have ever had", "we were disappointed",
        "a waste of money", "I want a refund", "everything was terrible", "it did not meet my expectations",
        "poor quality", "my family can't stand it", "I can't recommend it", "nothing but problems",
        "slow, rude and expensive", "it ruined my day", "not worth a penny", "I sent it back",
    ],
    True: [
        "what a let-down", "I could not be more annoyed", "one star is too many", "it failed when I needed it",
        "a real nuisance", "nothing like what I had hoped for", "we will never come back", "simply awful",
        "I was angry all evening", "nobody answered my complaint", "it spoiled my holiday", "badly made",
    ],
}  # fmt: skip
THINGS = {
    False: ["kettle", "hotel", "pizza", "phone", "film", "haircut", "backpack", "novel", "taxi ride", "desk lamp"],
    True: ["headset", "museum tour", "soup", "raincoat", "bicycle repair", "concert", "language course", "sofa"],
}


def sentiment(held_out: bool, draw: random.Random) -> Pair:
    """Ask whether a review is positive or negative; the test has other products and other opinions."""
    positive = draw.random() < 0.5
    first, second = draw.sample((GOOD if positive else BAD)[held_out], 2)
    thing = draw.choice(THINGS[held_out])
    review = draw.choice(
        [f"About the {thing}: {first}, {second}.", f"{first.capitalize()}. That is all I can say of my {thing}."]
        if held_out
        else [f"The {thing}? {first.capitalize()}, and {second}.", f"My new {thing}: {first}. {second.capitalize()}!"]
    )
    template = draw.choice(
        [
            "A customer wrote: '{review}' Was the customer's opinion positive or negative? One word.",
            "'{review}' Label this feedback as positive or negative, with a single word.",
        ]
        if held_out
        else [
            "Is this review positive or negative? Answer with one word.\n\n{review}",
            "Decide whether the review is positive or negative and reply with that word only.\n\nReview: {review}",
            "{review}\n\nPositive or negative? Just one word.",
        ]
    )
    return template.format(review=review), "positive" if positive else "negative"


NAMES = {
    False: ["anna", "li", "omar", "sofia", "tom", "priya", "lars", "julia", "kofi", "emma"],
    True: ["marta", "ben", "yuki", "carlos", "nina", "david", "aisha", "peter"],
}
HOSTS = {
    False: ["mail.org", "example.com", "shop.net", "school.edu", "post.de"],
    True: ["office.com", "garden.org", "museum.net", "bakery.co"],
}


def email(held_out: bool, draw: random.Random) -> Pair:
    """Ask for the e-mail address in a message; the test has other people, hosts and messages."""
    name, other = draw.sample(NAMES[held_out], 2)
    address = f"{name}{draw.choice(['', draw.randrange(2, 99)])}@{draw.choice(HOSTS[held_out])}"
    message = draw.choice(
        [
            f"Sorry, I moved to {address} last week. Best wishes, {other.capitalize()}",
            f"For tickets ask {name.capitalize()} in room {draw.randrange(2, 40)} or {address}, not me.",
        ]
        if held_out
        else [
            f"Hi {other.capitalize()}, please send the invoice to {address} before Friday. Thanks!",
            f"You can reach me at {address} or by phone after {draw.randrange(2, 9)} pm.",
            f"Our new contact is {name.capitalize()} ({address}). The office opens in May.",
        ]
    )
    template = draw.choice(
        [
            "Which e-mail address does this text mention? Reply with the address alone.\n\n{message}",
            "{message}\n\nGive me the e-mail address from the lines above, no other words.",
        ]
        if held_out
        else [
            "Extract the e-mail address. Answer with the address only.\n\n{message}",
            "Find the e-mail address in this message and write only that.\n\nMessage: {message}",
            "{message}\n\nWhat is the e-mail address? Just the address, please.",
        ]
    )
    return template.format(message=message), address


def price(held_out: bool, draw: random.Random) -> Pair:
    """Ask for the price in a message that has another number, too."""
    cost, other, thing = f"${draw.randrange(2, 200)}.{draw.randrange(100):02}", draw.randrange(2, 60), ""
    thing = draw.choice(THINGS[held_out])
    message = draw.choice(
        [
            f"Order {other}: one {thing}, {cost} in total, paid by card.",
            f"After {other} days we found a {thing} that costs {cost}.",
        ]
        if held_out
        else [
            f"The {thing} is yours for {cost} if you come within {other} days.",
            f"We have {other} left of this {thing}, each for {cost}.",
            f"I paid {cost} for the {thing} on page {other}.",
        ]
    )
    template = draw.choice(
        [
            "How much money does this text mention? Reply with the amount alone.\n\n{message}",
            "{message}\n\nGive me the price from the line above, no other words.",
        ]
        if held_out
        else [
            "Extract the price. Answer with the price only.\n\n{message}",
            "Find the price in this message and write only that.\n\nMessage: {message}",
            "{message}\n\nWhat is the price? Just the amount, please.",
        ]
    )
    return template.format(message=message), cost


SOURCES = {"math": ("gsm8k", "question"), "programming": ("mbpp", "text"), "science": ("arc_easy", "question")}
QUESTIONS: dict[tuple[str, str], list[str]] = {}
PROBLEMS: dict[str, list[Record]] = {}


def question_of(split: str, draw: random.Random) -> Pair:
    """Draw a question of GSM8K, MBPP or ARC-Easy, each from its own split, and its subject."""
    answer = draw.choice(list(SOURCES))
    name, column = SOURCES[answer]
    if (split, name) not in QUESTIONS:
        records = shuffled(get_task(name).load(split), f"{name}:0")
        QUESTIONS[split, name] = [record[column] for record in records if len(record[column]) <= 130]
    return draw.choice(QUESTIONS[split, name]), answer


def subject(split: str, draw: random.Random) -> Pair:
    """Ask for the subject of a question, in few wordings."""
    question, answer = question_of(split, draw)
    template = draw.choice(
        [
            "'{question}' Sort this into math, programming or science, with a single word.",
            "A pupil asks: '{question}' Which subject is it, math, programming or science? One word.",
        ]
        if split == "test"
        else [
            "Is this question about math, programming or science? Answer with one word.\n\n{question}",
            "Name the subject (math, programming or science) and nothing else.\n\nQuestion: {question}",
            "{question}\n\nWhich subject is this: math, programming or science? Just one word.",
        ]
    )
    return template.format(question=question), answer


def topic(split: str, draw: random.Random) -> Pair:
    """Ask for the subject of a question, in more wordings, none of which the test has."""
    question, answer = question_of(split, draw)
    template = draw.choice(
        [
            "Please file this under math, programming or science: '{question}' One word will do.",
            "'{question}' To which shelf does it go: math, programming or science? Write the word only.",
            "I got this from a student. Is it math, programming or science? Just say which.\n\n{question}",
        ]
        if split == "test"
        else [
            "Is this question about math, programming or science? Answer with one word.\n\n{question}",
            "Name the subject (math, programming or science) and nothing else.\n\nQuestion: {question}",
            "{question}\n\nWhich subject is this: math, programming or science? Just one word.",
            "Math, programming or science? {question}",
            "'{question}' Sort this into math, programming or science, with a single word.",
            "A pupil asks: '{question}' Which subject is it, math, programming or science? One word.",
            "Label the text as math, programming or science.\n\nText: {question}\nLabel:",
            "Which teacher should answer '{question}', the one for math, programming or science? One word, please.",
        ]
    )
    return template.format(question=question), answer


SENTENCES = {
    False: {
        "French": [
            "Je cherche un hôtel près de la gare.", "Il fait très beau aujourd'hui.", "Où est la bibliothèque ?",
            "Mon frère travaille dans une banque.", "Nous avons acheté du pain et du fromage.",
            "Elle ne veut pas venir avec nous.", "Le train part à huit heures.", "J'aime beaucoup cette chanson.",
        ],
        "German": [
            "Ich suche ein Hotel in der Nähe des Bahnhofs.", "Heute ist das Wetter sehr schön.",
            "Wo ist die Bibliothek?", "Mein Bruder arbeitet bei einer Bank.", "Wir haben Brot und Käse gekauft.",
            "Sie will nicht mit uns kommen.", "Der Zug fährt um acht Uhr ab.", "Dieses Lied gefällt mir sehr.",
        ],
        "Spanish": [
            "Busco un hotel cerca de la estación.", "Hoy hace muy buen tiempo.", "¿Dónde está la biblioteca?",
            "Mi hermano trabaja en un banco.", "Hemos comprado pan y queso.", "Ella no quiere venir con nosotros.",
            "El tren sale a las ocho.", "Me gusta mucho esta canción.",
        ],
        "Italian": [
            "Cerco un albergo vicino alla stazione.", "Oggi fa molto bello.", "Dov'è la biblioteca?",
            "Mio fratello lavora in una banca.", "Abbiamo comprato pane e formaggio.",
            "Lei non vuole venire con noi.", "Il treno parte alle otto.", "Mi piace molto questa canzone.",
        ],
    },
    True: {
        "French": [
            "Les enfants jouent dans le jardin.", "Je n'ai pas encore lu ce livre.", "Combien coûte cette chemise ?",
            "Ma voisine a deux chats noirs.", "On se voit demain matin au marché.", "Il faut fermer la fenêtre.",
            "La soupe est trop chaude.", "Tu peux m'aider à porter la valise ?", "Son père était médecin à Lyon.",
            "Avez-vous une table pour quatre personnes ?",
        ],
        "German": [
            "Die Kinder spielen im Garten.", "Ich habe dieses Buch noch nicht gelesen.", "Was kostet dieses Hemd?",
            "Meine Nachbarin hat zwei schwarze Katzen.", "Wir sehen uns morgen früh auf dem Markt.",
            "Man muss das Fenster schließen.", "Die Suppe ist zu heiß.", "Kannst du mir mit dem Koffer helfen?",
            "Sein Vater war Arzt in Bremen.", "Haben Sie einen Tisch für vier Personen?",
        ],
        "Spanish": [
            "Los niños juegan en el jardín.", "Todavía no he leído este libro.", "¿Cuánto cuesta esta camisa?",
            "Mi vecina tiene dos gatos negros.", "Nos vemos mañana en el mercado.", "Hay que cerrar la ventana.",
            "La sopa está demasiado caliente.", "¿Puedes ayudarme con la maleta?", "Su padre era médico en Sevilla.",
            "¿Tienen una mesa para cuatro personas?",
        ],
        "Italian": [
            "I bambini giocano nel giardino.", "Non ho ancora letto questo libro.", "Quanto costa questa camicia?",
            "La mia vicina ha due gatti neri.", "Ci vediamo domani mattina al mercato.",
            "Bisogna chiudere la finestra.", "La zuppa è troppo calda.", "Puoi aiutarmi con la valigia?",
            "Suo padre era medico a Torino.", "Avete un tavolo per quattro persone?",
        ],
    },
}  # fmt: skip


def language(held_out: bool, draw: random.Random) -> Pair:
    """Ask for the language of one or two sentences; the test has other sentences."""
    answer = draw.choice(list(SENTENCES[held_out]))
    sentences = " ".join(draw.sample(SENTENCES[held_out][answer], draw.randrange(1, 3)))
    template = draw.choice(
        [
            "My phone shows: '{sentences}' What language is that? One word.",
            "'{sentences}' Label this text with its language, in a single word.",
        ]
        if held_out
        else [
            "Which language is this? Answer with one word.\n\n{sentences}",
            "Name the language of this text and nothing else.\n\nText: {sentences}",
            "{sentences}\n\nIn which language is this written? Just one word.",
        ]
    )
    return template.format(sentences=sentences), answer


def calculate(split: str, draw: random.Random) -> Row:
    """Ask for the calculation of a problem of SVAMP from its own split; its number is what counts."""
    name = f"{split}:svamp"
    if name not in PROBLEMS:
        PROBLEMS[name] = get_task("svamp").rows(split, "calculation")
    row = draw.choice(PROBLEMS[name])
    problem, _, _ = row["prompt"][-1]["content"].rpartition("\n")
    template = draw.choice(
        ["{problem} Show the calculation and its result.", "Calculate, without words: {problem}"]
        if split == "test"
        else [
            "{problem}\nAnswer with the calculation only.",
            "{problem}\n\nWrite down the calculation and nothing else.",
            "What has to be calculated here, and what is the result? No words, please.\n\n{problem}",
        ]
    )
    solution = f"{row['calculation']} = {row['answer']}"
    return {"prompt": template.format(problem=problem), "answer": row["answer"], "solution": solution}


MADE: dict[str, Callable[[bool, random.Random], Pair]] = {
    "compare": compare, "sentiment": sentiment, "email": email, "price": price, "language": language,
}  # fmt: skip


PUBLIC: dict[str, Callable[[str, random.Random], Pair]] = {"subject": subject, "topic": topic}


def make(name: str, split: str, draw: random.Random) -> Row:
    """Make one request of a task."""
    if name == "calculate":
        return calculate(split, draw)
    prompt, answer = PUBLIC[name](split, draw) if name in PUBLIC else MADE[name](split == "test", draw)
    return {"prompt": prompt, "answer": answer}


def main() -> None:
    for name in (*MADE, *PUBLIC, "calculate"):
        (HERE / name).mkdir(parents=True, exist_ok=True)
        seen: set[str] = set()
        for split, count in COUNTS.items():
            draw, rows = random.Random(f"{name}:{split}"), []
            while len(rows) < count:
                row = make(name, split, draw)
                if row["prompt"] not in seen:
                    seen.add(row["prompt"])
                    rows.append(row)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            packed = io.BytesIO()
            with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
                file.write(text)
            (HERE / name / f"{split}.jsonl.gz").write_bytes(packed.getvalue())


if __name__ == "__main__":
    main()
