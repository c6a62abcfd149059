# SPDX-License-Identifier: Apache-2.0
"""
Requests that are no code, maths or science question: what the dispatch task calls "other".

A seed goes in, requests come out. Each is a template with its slots filled; train, validation and test share neither a
template nor a filler, so a classifier cannot know a held-out request by heart.
"""

from __future__ import annotations

import random
import re

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "Write a polite letter to {person} about {matter}.",
        "Write a short poem about {thing}.",
        "Write a birthday card for {person}.",
        "Give me a recipe for {food}.",
        "How do I keep {food} fresh for longer?",
        "Translate into French: I would like {food}, please.",
        "Translate this sentence into Spanish: my friend lives in {place}.",
        "What should I see on a weekend in {place}?",
        "I'm feeling nervous about {matter}. Any words of comfort?",
        "Tell me a bedtime story in which {person} finds {thing}.",
        "Suggest a name for a shop that sells {thing}.",
        "Which film would you watch with {person} on a rainy evening?",
        "Hello! How was your day? Mine was all about {matter}.",
        "Make this sound friendlier: send me {thing} now.",
        "Write a speech of two minutes for {person} on {matter}.",
        "Plan a quiet holiday in {place} with {person}.",
        "What is a good present for {person} who loves {thing}?",
        "Correct the spelling: we was visiting {place} yesterdey.",
        "Describe {place} at sunrise in one paragraph.",
        "Give me three ideas for a party with {food}.",
        "Summarise what people usually say about {matter}.",
        "Who could help me with {matter} in {place}?",
        "Write an advertisement for {thing}.",
        "Please rewrite politely: {person} forgot {thing} again.",
    ),
    "validation": (
        "Draft an invitation for {person} to a dinner in {place}.",
        "Can you say in Italian that {person} likes {food}?",
        "What goes well with {food} on a cold evening?",
        "Invent a riddle about {thing}.",
        "My neighbour talks of {matter} all the time. What do I answer?",
        "Recommend a novel that is set in {place}.",
        "Turn this into a headline: {person} wins {thing}.",
        "Thanks for your help with {matter}, have a nice evening!",
        "Write a song for children about {food}.",
        "How should I dress for {matter} in {place}?",
    ),
    "test": (
        "Compose a thank-you note to {person} for {thing}.",
        "Help me apologise to {person} for missing {matter}.",
        "How would you serve {food} to guests from {place}?",
        "Put into German: {person} is waiting in {place}.",
        "Write the opening of a detective story set in {place}.",
        "Give me a slogan for {thing}.",
        "I had an argument with {person} over {matter}. What now?",
        "Which music suits a dinner of {food}?",
        "Pack a suitcase for ten days in {place}: what must not be missing?",
        "Good morning! Do you like {food}?",
        "Write a review of a restaurant in {place} that serves {food}.",
        "Shorten this message to {person}: I cannot come because of {matter}.",
        "Suggest a hobby for {person} who is tired of {matter}.",
        "Write a dialogue between {person} and a seller of {thing}.",
        "What does it mean to dream of {thing}?",
        "Describe {thing} to {person} in the style of a fairy tale.",
    ),
}

FILLERS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "person": (
            "my landlord",
            "my grandmother",
            "a new colleague",
            "the mayor",
            "my sister",
            "an old friend",
            "my teacher",
            "the baker",
            "a tired nurse",
            "my cousin",
        ),
        "matter": (
            "a late delivery",
            "moving house",
            "a job interview",
            "the noise at night",
            "a lost parcel",
            "the school play",
            "a broken heater",
            "a garden fence",
            "the next election",
            "learning to swim",
        ),
        "thing": (
            "a red umbrella",
            "old clocks",
            "a wooden boat",
            "autumn leaves",
            "a talking cat",
            "blue candles",
            "a silver ring",
            "warm socks",
            "a paper kite",
            "wild flowers",
        ),
        "food": (
            "lentil soup",
            "apple pie",
            "fresh bread",
            "fried rice",
            "strawberry jam",
            "mushroom risotto",
            "pumpkin curry",
            "a green salad",
            "pancakes",
            "tomato pasta",
        ),
        "place": (
            "Lisbon",
            "the Alps",
            "Kyoto",
            "a small village",
            "Marrakesh",
            "Edinburgh",
            "the Black Forest",
            "Buenos Aires",
            "a seaside town",
            "Istanbul",
        ),
    },
    "validation": {
        "person": ("my uncle", "the librarian", "a football coach", "my flatmate", "our postman", "a young painter"),
        "matter": ("the wedding", "a cancelled flight", "saving money", "the dog next door", "a power cut", "yoga"),
        "thing": ("a brass key", "snow globes", "a rocking chair", "silk scarves", "an old map", "a music box"),
        "food": ("onion soup", "cheese dumplings", "lemon cake", "grilled fish", "bean stew", "rice pudding"),
        "place": ("Prague", "the Highlands", "Havana", "a mountain hut", "Copenhagen", "Naples"),
    },
    "test": {
        "person": (
            "my boss",
            "a shy student",
            "my mother-in-law",
            "the dentist",
            "our choir leader",
            "a retired sailor",
            "my best friend",
            "the gardener",
            "a tourist guide",
            "my little brother",
        ),
        "matter": (
            "a missed train",
            "the office party",
            "a rude email",
            "changing careers",
            "a family reunion",
            "the rent",
            "a book club",
            "early mornings",
            "a flooded cellar",
            "the town festival",
        ),
        "thing": (
            "a leather bag",
            "a lighthouse",
            "porcelain cups",
            "a white horse",
            "handmade soap",
            "a rusty bicycle",
            "an empty theatre",
            "wool blankets",
            "a stone bridge",
            "a fountain pen",
        ),
        "food": (
            "potato gratin",
            "spring rolls",
            "cherry tart",
            "roast chicken",
            "chickpea stew",
            "waffles",
            "baked aubergine",
            "seafood noodles",
            "carrot cake",
            "stuffed peppers",
        ),
        "place": (
            "Vienna",
            "the Baltic coast",
            "Hanoi",
            "a desert camp",
            "Reykjavik",
            "Seville",
            "the Scottish isles",
            "Montreal",
            "a fishing harbour",
            "Krakow",
        ),
    },
}


def everyday_requests(split: str, count: int) -> list[str]:
    """
    Draw different requests, the same for every call.

    Args:
        split (`str`): "train", "validation" or "test".
        count (`int`): How many; each template is used about equally often.

    Returns:
        `list` of `str`, no two the same; fewer than `count` only where the templates allow no more.
    """
    rng = random.Random(f"everyday:{split}")
    fillers = FILLERS[split]
    requests: dict[str, None] = {}
    for attempt in range(20 * count):
        if len(requests) == count:
            break
        template = TEMPLATES[split][attempt % len(TEMPLATES[split])]
        requests.setdefault(re.sub(r"\{(\w+)\}", lambda slot: rng.choice(fillers[slot.group(1)]), template))
    return list(requests)
