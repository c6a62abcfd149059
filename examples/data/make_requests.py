# SPDX-License-Identifier: Apache-2.0
"""
Make `requests/<task>/{train,validation,test}.jsonl.gz`: short requests whose answer is a word, a number or a quote.

    PEFT_SVF_DATA=<folder with the full files> python examples/data/make_requests.py

Validation and test have wordings, names, products and numbers of their own, so that no phrase can be learned by heart
and validation chooses what carries over to other words; *compare*, *subject*, *topic* and *calculate* validate on the
wordings of training. Lines are those of `peft_svf.tasks.jsonl_task`: a text is right if it is the answer, apart from
case, spaces and a full stop, or if it ends with the right number.
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
Row = dict[str, str]  # prompt, answer, and a solution where that is more than the answer


def compare(split: str, draw: random.Random) -> Row:
    """Ask for the larger of two numbers; the test's have an odd sum."""
    held_out = split == "test"
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
    return {"prompt": template.format(a=a, b=b), "answer": str(max(a, b))}


GOOD = {
    "train": [
        "I love it", "it works perfectly", "the best I have ever had", "we were delighted", "great value for money",
        "I would buy it again", "everything was wonderful", "it exceeded my expectations", "superb quality",
        "my family adores it", "I can't recommend it enough", "no complaints at all",
        "a pleasure from start to finish", "fast, friendly and fair", "it made my day", "worth every penny",
        "I laughed and sang along", "it runs for days without charging", "my back has stopped hurting",
        "the staff remembered our names", "quiet, light and clever", "I have told all my friends about it",
        "better than the old one in every way", "it fits as if made for me", "the children ask for it again",
        "I was moved to tears of happiness", "so easy that my grandmother uses it", "it paid for itself in a week",
    ],
    "validation": [
        "I am thrilled", "you will not regret it", "it does more than it promises", "a treat for the senses",
        "my favourite by far", "thank you for this gem", "I sleep well again", "an evening to remember",
    ],
    "test": [
        "what a lovely surprise", "I could not be happier", "five stars from me", "it never let me down",
        "a real joy", "exactly what I had hoped for", "we will come back soon", "simply brilliant",
        "I smiled all evening", "nothing to improve", "it saved my holiday", "beautifully made",
    ],
}  # fmt: skip
BAD = {
    "train": [
        "I hate it", "it broke after two days", "the worst I have ever had", "we were disappointed",
        "a waste of money", "I want a refund", "everything was terrible", "it did not meet my expectations",
        "poor quality", "my family can't stand it", "I can't recommend it", "nothing but problems",
        "slow, rude and expensive", "it ruined my day", "not worth a penny", "I sent it back",
        "I fell asleep after ten minutes", "the battery is empty within an hour", "my back hurts since then",
        "the staff looked through us", "loud, heavy and clumsy", "I have warned all my friends about it",
        "worse than the old one in every way", "two sizes too small, whatever the label says",
        "the children cried and wanted to go home", "it smells of burnt plastic", "nobody could tell me how to use it",
        "they charged me twice",
    ],
    "validation": [
        "I am furious", "you will regret it", "it does half of what it promises", "an insult to the senses",
        "a mistake I will not make twice", "shame on the maker", "I can not sleep now", "an evening to forget",
    ],
    "test": [
        "what a let-down", "I could not be more annoyed", "one star is too many", "it failed when I needed it",
        "a real nuisance", "nothing like what I had hoped for", "we will never come back", "simply awful",
        "I was angry all evening", "nobody answered my complaint", "it spoiled my holiday", "badly made",
    ],
}  # fmt: skip
THINGS = {
    "train": [
        "kettle", "hotel", "pizza", "phone", "film", "haircut", "backpack", "novel", "taxi ride", "desk lamp",
        "mattress", "dentist", "app", "restaurant", "dress", "blender", "campsite", "podcast", "bank", "bike lock",
    ],
    "validation": ["ferry trip", "keyboard", "burger", "umbrella"],
    "test": ["headset", "museum tour", "soup", "raincoat", "bicycle repair", "concert", "language course", "sofa"],
}  # fmt: skip
REVIEWS = {
    "train": [
        "The {thing}? {First}, and {second}.", "My new {thing}: {first}. {Second}!",
        "{First}. I mean the {thing}.", "We tried this {thing} in May. {First}. {Second}.",
        "Dear team, about your {thing}: {first}.", "{First}! {Second}! What a {thing}.",
        "If you think about a {thing} like this one: {first}, honestly.",
    ],
    "validation": ["{thing}, bought in spring. {First}; {second}.", "So, the {thing}. {First}."],
    "test": ["About the {thing}: {first}, {second}.", "{First}. That is all I can say of my {thing}."],
}  # fmt: skip
SENTIMENT = {
    "train": [
        "Is this review positive or negative? Answer with one word.\n\n{review}",
        "Decide whether the review is positive or negative and reply with that word only.\n\nReview: {review}",
        "{review}\n\nPositive or negative? Just one word.",
        "Positive or negative: {review}",
        "Did this guest like it? '{review}' Say positive or negative.",
        "'{review}' - is the writer happy or unhappy? Answer positive or negative.",
        "Classify the sentiment of this text as positive or negative.\n\nText: {review}\nSentiment:",
        "Our client said: '{review}' Is that positive or negative feedback?",
        "Tell me in one word if this comment is positive or negative. {review}",
        "Read the comment and give its label, positive or negative: '{review}'",
        "'{review}' Was the buyer satisfied? Reply with positive or negative only.",
        "What is the tone here, negative or positive? {review}",
    ],
    "validation": [
        "Rate this opinion as negative or positive. A single word, please. {review}",
        "A visitor left this note: '{review}' Would you call it positive or negative?",
    ],
    "test": [
        "A customer wrote: '{review}' Was the customer's opinion positive or negative? One word.",
        "'{review}' Label this feedback as positive or negative, with a single word.",
    ],
}


def sentiment(split: str, draw: random.Random) -> Row:
    """Ask whether a review is positive or negative; validation and test have other products, opinions, wordings."""
    positive = draw.random() < 0.5
    first, second = draw.sample((GOOD if positive else BAD)[split], 2)
    words = {"first": first, "second": second, "First": first[0].upper() + first[1:]}
    words |= {"Second": second[0].upper() + second[1:], "thing": draw.choice(THINGS[split])}
    review = draw.choice(REVIEWS[split]).format(**words)
    prompt = draw.choice(SENTIMENT[split]).format(review=review)
    return {"prompt": prompt, "answer": "positive" if positive else "negative"}


NAMES = {
    "train": [
        "anna", "li", "omar", "sofia", "tom", "priya", "lars", "julia", "kofi", "emma", "ines", "raj", "olga", "felix",
        "mei", "jonas", "zoe", "pablo", "greta", "ahmed", "ruth", "ivan", "lucia", "hugo", "tara", "sven", "chloe",
        "marco", "leila", "oscar",
    ],
    "validation": ["dora", "viktor", "naomi", "samir", "elsa", "bruno"],
    "test": ["marta", "ben", "yuki", "carlos", "nina", "david", "aisha", "peter"],
}  # fmt: skip
HOSTS = {
    "train": [
        "mail.org", "example.com", "shop.net", "school.edu", "post.de", "inbox.io", "river.fr", "lake.ca",
        "north.co.uk", "blue-sky.com", "atlas.info", "cafe21.net", "clinic.org", "town.se", "studio.tv",
        "harbor.us", "fastmail.dev",
    ],
    "validation": ["library.org", "sunset.it", "kiosk.com", "team.ai"],
    "test": ["office.com", "garden.org", "museum.net", "bakery.co"],
}  # fmt: skip
LETTERS = {
    "train": [
        "Hi {Other}, please send the invoice to {address} before Friday. Thanks!",
        "You can reach me at {address} or by phone after {n} pm.",
        "Our new contact is {Name} ({address}). The office opens in May.",
        "Write to {address} and not to the old address. {Other}",
        "{address} is where the forms go, {n} pages in all.",
        "Dear {Other}, {Name} has left the team; her mail now goes to {address}, says the front desk.",
        "Lost: a grey cat. If you see it, call {n}{n}5-0{n} or mail {address}!",
        "Questions? {address}. We answer within {n} days.",
        "I asked {Other}, who told me to copy {address} on everything from now on.",
        "Sent by {Name} <{address}> on Monday, with {n} pictures.",
    ],
    "validation": [
        "The keys are with {Other}; for the code mail {address} by {n} o'clock.",
        "{Name} can be found under {address}, or at desk {n}.",
    ],
    "test": [
        "Sorry, I moved to {address} last week. Best wishes, {Other}",
        "For tickets ask {Name} in room {n} or {address}, not me.",
    ],
}
EMAIL = {
    "train": [
        "Extract the e-mail address. Answer with the address only.\n\n{message}",
        "Find the e-mail address in this message and write only that.\n\nMessage: {message}",
        "{message}\n\nWhat is the e-mail address? Just the address, please.",
        "Where can I write to? Copy the e-mail address from the text and nothing else. Text: {message}",
        "'{message}' Return the e-mail address, without any comment.",
        "Quote only the e-mail address that stands in the following note.\n\n{message}",
        "{message}\nE-mail address:",
        'I need the mail address from this: "{message}" No sentence, only the address.',
        "Read the text and output its e-mail address.\n\n{message}",
        "To whom does one mail here? {message} Answer with one address.",
    ],
    "validation": [
        "Which mail address is in the note below? Type it and stop.\n\n{message}",
        "{message}\n\nPull out the e-mail address, please, with nothing around it.",
    ],
    "test": [
        "Which e-mail address does this text mention? Reply with the address alone.\n\n{message}",
        "{message}\n\nGive me the e-mail address from the lines above, no other words.",
    ],
}


def email(split: str, draw: random.Random) -> Row:
    """Ask for the e-mail address in a message; validation and test have other people, hosts, messages, wordings."""
    name, other = draw.sample(NAMES[split], 2)
    host = draw.choice(HOSTS[split])
    number = draw.choice(["", draw.randrange(2, 99)])
    if split == "train":  # any letters: an address is copied, not known
        syllables = "".join(draw.choice("bdfghklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randrange(2, 4)))
        name = draw.choice([name, f"{name}{draw.choice('._-')}{syllables}", syllables])
    address = f"{name}{number}@{host}"
    message = draw.choice(LETTERS[split]).format(
        address=address, Name=name.split(".")[0].capitalize(), Other=other.capitalize(), n=draw.randrange(2, 40)
    )
    return {"prompt": draw.choice(EMAIL[split]).format(message=message), "answer": address}


OFFERS = {
    "train": [
        "The {thing} is yours for {cost} if you come within {n} days.",
        "We have {n} left of this {thing}, each for {cost}.",
        "I paid {cost} for the {thing} on page {n}.",
        "{n} people asked; the {thing} went to Li for {cost}, delivery included.",
        "{cost} buys you a {thing} and {n} free samples.",
        "Invoice {n}: {cost} for one {thing}, due on Friday, by bank transfer.",
        "My {thing} broke after {n} weeks, and the repair was {cost}, which I found too much.",
        "Sold! A {thing}, number {n} of the list, at {cost} including tax.",
        "For {cost} a month you can rent a {thing}, at least for {n} months.",
        "Dear guest, your bill is {cost} ({n} nights without the {thing}).",
    ],
    "validation": [
        "Room {n} has a {thing}; the deposit for it is {cost}, returned at the end.",
        "At {cost} the {thing} is a bargain, said {n} of our readers.",
    ],
    "test": [
        "Order {n}: one {thing}, {cost} in total, paid by card.",
        "After {n} days we found a {thing} that costs {cost}.",
    ],
}
GOODS = {
    "train": [
        *THINGS["train"], "lamp", "garden chair", "camera", "guitar", "ticket", "coffee maker", "rug", "toaster",
        "winter coat", "bookshelf", "printer", "pair of skis", "tent", "cake", "massage", "watch", "vase", "drill",
    ],
    "validation": ["piano", "sleeping bag", "mirror", "scooter"],
    "test": THINGS["test"],
}  # fmt: skip
PRICE = {
    "train": [
        "Extract the price. Answer with the price only.\n\n{message}",
        "Find the price in this message and write only that.\n\nMessage: {message}",
        "{message}\n\nWhat is the price? Just the amount, please.",
        "'{message}' What does it cost? Answer with one amount.",
        "Copy the price from the text and nothing else. Text: {message}",
        "{message}\nPrice:",
        "Return the sum of money in the following note, without any comment.\n\n{message}",
        'I only need the price from this: "{message}" No sentence.',
        "Read the text and output the amount of money.\n\n{message}",
        "How expensive is it? {message} Quote the price alone.",
    ],
    "validation": [
        "Which price is in the note below? Type it and stop.\n\n{message}",
        "{message}\n\nPull out the amount in dollars, please, with nothing around it.",
    ],
    "test": [
        "How much money does this text mention? Reply with the amount alone.\n\n{message}",
        "{message}\n\nGive me the price from the line above, no other words.",
    ],
}


def price(split: str, draw: random.Random) -> Row:
    """Ask for the price in a message that has another number, too."""
    cost, other = f"${draw.randrange(2, 200)}.{draw.randrange(100):02}", draw.randrange(2, 60)
    message = draw.choice(OFFERS[split]).format(cost=cost, thing=draw.choice(GOODS[split]), n=other)
    return {"prompt": draw.choice(PRICE[split]).format(message=message), "answer": cost}


SOURCES = {"math": ("gsm8k", "question"), "programming": ("mbpp", "text"), "science": ("arc_easy", "question")}
QUESTIONS: dict[tuple[str, str], list[str]] = {}
PROBLEMS: dict[str, list[Record]] = {}
SUBJECT = {
    "train": [
        "Is this question about math, programming or science? Answer with one word.\n\n{question}",
        "Name the subject (math, programming or science) and nothing else.\n\nQuestion: {question}",
        "{question}\n\nWhich subject is this: math, programming or science? Just one word.",
    ],
    "test": [
        "'{question}' Sort this into math, programming or science, with a single word.",
        "A pupil asks: '{question}' Which subject is it, math, programming or science? One word.",
    ],
}
TOPIC = {
    "train": [
        *SUBJECT["train"],
        "Math, programming or science? {question}",
        *SUBJECT["test"],
        "Label the text as math, programming or science.\n\nText: {question}\nLabel:",
        "Which teacher should answer '{question}', the one for math, programming or science? One word, please.",
    ],
    "test": [
        "Please file this under math, programming or science: '{question}' One word will do.",
        "'{question}' To which shelf does it go: math, programming or science? Write the word only.",
        "I got this from a student. Is it math, programming or science? Just say which.\n\n{question}",
    ],
}


def question_of(split: str, draw: random.Random) -> tuple[str, str]:
    """Draw a question of GSM8K, MBPP or ARC-Easy, each from its own split, and its subject."""
    answer = draw.choice(list(SOURCES))
    name, column = SOURCES[answer]
    if (split, name) not in QUESTIONS:
        records = shuffled(get_task(name).load(split), f"{name}:0")
        QUESTIONS[split, name] = [record[column] for record in records if len(record[column]) <= 130]
    return draw.choice(QUESTIONS[split, name]), answer


def subject(split: str, draw: random.Random) -> Row:
    """Ask for the subject of a question, in few wordings."""
    question, answer = question_of(split, draw)
    template = draw.choice(SUBJECT["test" if split == "test" else "train"])
    return {"prompt": template.format(question=question), "answer": answer}


def topic(split: str, draw: random.Random) -> Row:
    """Ask for the subject of a question, in more wordings, none of which the test has."""
    question, answer = question_of(split, draw)
    template = draw.choice(TOPIC["test" if split == "test" else "train"])
    return {"prompt": template.format(question=question), "answer": answer}


SENTENCES = {
    "train": {
        "French": [
            "Je cherche un hôtel près de la gare.", "Il fait très beau aujourd'hui.", "Où est la bibliothèque ?",
            "Mon frère travaille dans une banque.", "Nous avons acheté du pain et du fromage.",
            "Elle ne veut pas venir avec nous.", "Le train part à huit heures.", "J'aime beaucoup cette chanson.",
            "Quel âge a ta sœur ?", "Je voudrais un café, s'il vous plaît.", "Les magasins sont fermés le dimanche.",
            "Il a perdu ses clés hier soir.", "Merci pour votre lettre.", "Ce film était trop long.",
        ],
        "German": [
            "Ich suche ein Hotel in der Nähe des Bahnhofs.", "Heute ist das Wetter sehr schön.",
            "Wo ist die Bibliothek?", "Mein Bruder arbeitet bei einer Bank.", "Wir haben Brot und Käse gekauft.",
            "Sie will nicht mit uns kommen.", "Der Zug fährt um acht Uhr ab.", "Dieses Lied gefällt mir sehr.",
            "Wie alt ist deine Schwester?", "Ich hätte gern einen Kaffee, bitte.", "Der Laden hat heute zu.",
            "Er hat gestern Abend seine Schlüssel verloren.", "Danke für Ihren Brief.", "Dieser Film war zu lang.",
        ],
        "Spanish": [
            "Busco un hotel cerca de la estación.", "Hoy hace muy buen tiempo.", "¿Dónde está la biblioteca?",
            "Mi hermano trabaja en un banco.", "Hemos comprado pan y queso.", "Ella no quiere venir con nosotros.",
            "El tren sale a las ocho.", "Me gusta mucho esta canción.",
            "¿Cuántos años tiene tu hermana?", "Quisiera un café, por favor.", "La tienda está cerrada hoy.",
            "Anoche perdió sus llaves.", "Gracias por su carta.", "Esa película fue demasiado larga.",
        ],
        "Italian": [
            "Cerco un albergo vicino alla stazione.", "Oggi fa molto bello.", "Dov'è la biblioteca?",
            "Mio fratello lavora in una banca.", "Abbiamo comprato pane e formaggio.",
            "Lei non vuole venire con noi.", "Il treno parte alle otto.", "Mi piace molto questa canzone.",
            "Quanti anni ha tua sorella?", "Vorrei un caffè, per favore.", "La domenica i negozi sono chiusi.",
            "Ieri sera ha perso le chiavi.", "Grazie per la Sua lettera.", "Quel film era troppo lungo.",
        ],
    },
    "validation": {
        "French": ["Le médecin arrive dans une heure.", "Quelle heure est-il ?", "Nous habitons près de la mer."],
        "German": ["Der Arzt kommt in einer Stunde.", "Wie spät ist es?", "Wir wohnen nahe am Meer."],
        "Spanish": ["El médico llega en una hora.", "¿Qué hora es?", "Vivimos cerca del mar."],
        "Italian": ["Il medico arriva tra un'ora.", "Che ore sono?", "Abitiamo vicino al mare."],
    },
    "test": {
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


LANGUAGE = {
    "train": [
        "Which language is this? Answer with one word.\n\n{text}",
        "Name the language of this text and nothing else.\n\nText: {text}",
        "{text}\n\nIn which language is this written? Just one word.",
        "What language does '{text}' belong to? Reply with its name only.",
        'Language of "{text}":',
        "I found this note: {text} Which language is it, German, French, Italian or Spanish?",
        "'{text}' Is that Spanish, Italian, French or German? Say which.",
        "Identify the language.\n\n{text}\n\nLanguage:",
        "Tell me the language of the following, in a word: {text}",
        "Where do people speak like this? Give only the language. {text}",
    ],
    "validation": [
        "A guest wrote '{text}' into our book. In what tongue? One word, please.",
        "{text}\n\nState the language, with no other words.",
    ],
    "test": [
        "My phone shows: '{text}' What language is that? One word.",
        "'{text}' Label this text with its language, in a single word.",
    ],
}


def language(split: str, draw: random.Random) -> Row:
    """Ask for the language of one or two sentences; validation and test have other sentences and wordings."""
    answer = draw.choice(list(SENTENCES[split]))
    sentences = " ".join(draw.sample(SENTENCES[split][answer], draw.randrange(1, 3)))
    return {"prompt": draw.choice(LANGUAGE[split]).format(text=sentences), "answer": answer}


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


MADE: tuple[Callable[[str, random.Random], Row], ...] = (
    compare, sentiment, email, price, language, subject, topic, calculate
)  # fmt: skip


def main() -> None:
    for make in MADE:
        name = make.__name__
        (HERE / name).mkdir(parents=True, exist_ok=True)
        seen: set[str] = set()
        for split, count in COUNTS.items():
            draw, rows = random.Random(f"{name}:{split}"), []
            while len(rows) < count:
                row = make(split, draw)
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
