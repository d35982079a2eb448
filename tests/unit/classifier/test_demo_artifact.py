"""The committed demo artifact on prompts written by hand, none of them from its training data."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_models.demo.prompt_templates import templated
from service.classifier.classifier import Classifier
from service.classifier.conversation_classifier import classify_turns
from service.classifier.router_artifact import load_artifact

ARTIFACT = Path(__file__).parents[3] / "router_models" / "artifacts" / "demo@1"

MUST = {
    "code": [
        "Write a Python function that reverses a string",
        "write a python function that adds two numbers",
        "Write a Python function that checks if a number is prime.",
    ],
    "math": [
        "A farmer has 12 cows and buys 7 more. How many cows?",
        "What is 15% of 80?",
        "Sarah has 3 boxes with 24 crayons each. She gives away 10. How many crayons are left?",
    ],
    "intents": [
        "What's my bank balance?",
        "book a flight to Paris tomorrow",
        "Please freeze my bank account",
    ],
    "general": [
        "Hello! Who are you?",
        "Tell me about the French revolution",
        "Tell me a joke",
        "hello",
        "who was Napoleon",
        "",
    ],
}

HELD_OUT = {
    "code": [
        "How can I iterate over two lists at once in Python?",
        "I get 'list' object is not callable. What did I do wrong?",
        "def merge(left, right):\n    # merge two sorted lists\n",
        "Please implement quicksort.",
        "Write a decorator that measures how long a function takes",
        "What's wrong with this?\nwhile True\n    print('x')",
        "Explain the difference between a list and a tuple in Python",
        "Parse this JSON string into a dataclass with Python",
        "Rewrite the following loop as a list comprehension: for x in xs: ys.append(x*2)",
        "Create a class Rectangle with width, height and an area method",
        "How do I catch an exception in Python?",
        "Write a script which renames every .txt file in a folder",
        "import pandas as pd\ndf = pd.read_csv('a.csv')\nHow do I drop rows with missing values?",
        "What does `yield` do?",
        "Generate a unit test with pytest for my parse_url function",
        "Implement a least recently used cache",
        "git says I have a merge conflict, how do I resolve it?",
        "Write a function is_leap_year(year) that returns True for leap years.",
        "const sum = (a, b) => a + b; // convert to Python",
        "Write a program that prints the numbers from 1 to 100",
    ],
    "math": [
        "Tom buys 4 notebooks at $3 each and pays with a $20 bill. How much change does he get?",
        "If a car uses 6 liters per 100 km, how many liters for 350 km?",
        "What is 347 + 589?",
        "12 * 13",
        "Solve x^2 - 5x + 6 = 0",
        "Lisa runs 5 km every day for two weeks. How many kilometers did she run in total?",
        "A pizza is cut into 8 slices. Three friends eat 2 slices each. How many slices remain?",
        "what's 20 percent of 250",
        "The sum of two numbers is 30 and their difference is 4. What are the numbers?",
        "How many eggs are in 7 dozen?",
        "There are 24 students in a class. A third of them are absent. How many are present?",
        "Compute the area of a triangle with base 10 and height 6.",
        "Mike is 3 times as old as Jill. In 5 years he will be twice as old. How old is Jill now?",
        "A jacket costs $120. It is on sale for 25% off. What does it cost now?",
        "Find the least common multiple of 12 and 18",
        "An orchard has 15 rows with 22 trees in each row. How many trees are there?",
        "what is 9 squared plus 16",
        "A baker makes 60 rolls an hour. How many rolls does she make in a 7 hour shift?",
    ],
    "intents": [
        "move 200 dollars from checking to savings",
        "I think someone stole my credit card",
        "what is the weather going to be like this weekend",
        "set a timer for ten minutes",
        "wake me up at 6 tomorrow morning",
        "find me a hotel in Berlin with good reviews",
        "how do i change my pin number",
        "play my workout playlist",
        "remind me to take out the trash tonight",
        "can you book a table for two at Luigi's",
        "is my flight delayed",
        "how much do i owe on my visa card",
        "turn the volume up",
        "when do i get paid",
        "what's the traffic like on the way to work",
        "put eggs on the shopping list",
        "dim the living room lights",
        "i lost my luggage at the airport",
        "request vacation from monday to friday",
        "increase my credit limit",
    ],
    "general": [
        "What can you tell me about penguins?",
        "Write a limerick about a frog",
        "I had a bad day. Cheer me up.",
        "Who painted the Mona Lisa?",
        "Explain why leaves change color in autumn.",
        "Give me an idea for a birthday party",
        "What is the tallest mountain in Africa?",
        "hey there, how's it going",
        "Summarize the plot of Romeo and Juliet",
        "Describe the life of a medieval knight.",
        "What are some healthy habits?",
        "Tell me something about Stockholm",
        "Who won the second world war?",
        "Write a letter to my landlord about a broken window.",
        "Why did the Roman Empire fall?",
        "What's the difference between weather and climate?",
        "Is there life on Mars?",
        "Suggest three names for a puppy",
        "Give me a motivational quote",
        "How does a vaccine protect me?",
        "asdkjh qwelkjh zxmnb poiqwe",
        "你好，你能介绍一下你自己吗？",
        "Расскажи мне о Москве",
        "أخبرني عن تاريخ مصر",
        "\ud800\x00\udfff",
        "🙂🙂🙂",
    ],
}

# Written after everything was settled and never used to change anything.
FRESH = {
    "code": [
        "How do I convert a dict to a list of tuples?",
        "Write a generator that yields prime numbers.",
        "My for loop never ends, can you spot the bug? i = 0\nwhile i < 5:\n    print(i)",
        "Create a Flask endpoint that returns the current time as JSON",
        "Write a function to compute the median of an array",
        "What is the big O of inserting into a heap?",
        "Please write Python code to resize all images in a directory.",
        "How to declare an array in C++?",
        "Turn this function into an async one: def fetch(url): return requests.get(url).text",
        "sort a dictionary by value python",
    ],
    "math": [
        "Peter has 50 dollars. He buys 3 books for 8 dollars each. How much money is left?",
        "What is the product of 14 and 6?",
        "If 3 pens cost $4.50, what do 10 pens cost?",
        "25 + 17 - 9",
        "A bus carries 40 people. At the first stop 12 get off and 5 get on. How many are aboard?",
        "What fraction of an hour is 45 minutes?",
        "John's salary rose from 2000 to 2300. By how many percent did it rise?",
        "Anna bakes 48 muffins and packs them in boxes of 6. How many boxes does she need?",
    ],
    "intents": [
        "how much money do i have in savings",
        "cancel my dinner reservation for tonight",
        "what's the temperature outside",
        "i need a ride to the airport",
        "tell my bank i'm traveling to spain",
        "when does my card expire",
        "what songs are on my playlist",
        "are there any flights from denver to austin on sunday",
        "schedule an oil change for my car",
        "did my paycheck get deposited",
    ],
    "general": [
        "What was the Marshall Plan?",
        "Write a rhyme about winter",
        "How do bees make honey?",
        "Who discovered penicillin?",
        "Tell me about the planet Saturn",
        "Which animals live in the desert?",
        "I am feeling lonely tonight.",
        "Please proofread: Their going to the store.",
        "Give me some advice on public speaking",
        "Qui a écrit Les Misérables ?",
        "zzzz qqqq xkcd vfrt bgty",
        "What's the best way to learn history?",
    ],
}
FRESH_CONVERSATIONS = [
    (["Write a function that sorts a list of names", "what is its time complexity?"], "code"),
    (["Write a function that sorts a list of names", "use recursion instead"], "code"),
    (["Write a function that sorts a list of names", "it doesn't work"], "code"),
    (["Write a function that sorts a list of names", "hmm", "can you comment it"], "code"),
    (["If 3 pens cost $4.50, what do 10 pens cost?", "and 25 pens?"], "math"),
    (["If 3 pens cost $4.50, what do 10 pens cost?", "round it to whole dollars"], "math"),
    (["If 3 pens cost $4.50, what do 10 pens cost?", "I don't understand"], "math"),
    (["Tell me about the planet Saturn", "how many moons does it have?"], "general"),
    (["Tell me about the planet Saturn", "thanks, what is 12 * 13?"], "math"),
    (["Write a rhyme about winter", "make it longer"], "general"),
    (["Write a rhyme about winter", "ok. what's the temperature outside"], "intents"),
    (["schedule an oil change for my car", "on tuesday please"], "intents"),
    (["schedule an oil change for my car", "thank you. who was Galileo?"], "general"),
]

# Oldest turn first, and what the whole must be taken for.
CONVERSATIONS = [
    (["Write a Python function that parses a date", "ok, go on"], "code"),
    (["Write a Python function that parses a date", "thanks", "continue please"], "code"),
    (["Write a Python function that parses a date", "make it shorter"], "code"),
    (["Write a Python function that parses a date", "Can you explain it?"], "code"),
    (["Write a Python function that parses a date", "Now add type hints"], "code"),
    (["A farmer has 12 cows and buys 7 more. How many cows?", "why?"], "math"),
    (["A farmer has 12 cows and buys 7 more. How many cows?", "and if he buys 20?"], "math"),
    (["A farmer has 12 cows and buys 7 more. How many cows?", "Are you sure?", "ok"], "math"),
    (["A farmer has 12 cows and buys 7 more. How many cows?", "show me the steps"], "math"),
    (["A farmer has 12 cows and buys 7 more. How many cows?", "That is wrong, try again."], "math"),
    (["book a flight to Paris tomorrow", "yes"], "intents"),
    (["book a flight to Paris tomorrow", "no, the day after"], "intents"),
    (["Tell me about the French revolution", "go on"], "general"),
    (["Tell me about the French revolution", "and then what happened?"], "general"),
    (["Hello!", "What is 15% of 80?"], "math"),
    (["Tell me a joke", "Write a Python function that reverses a string"], "code"),
    (["What is 15% of 80?", "Now write a Python function that computes it"], "code"),
    (["What is 15% of 80?", "thanks! what's my bank balance?"], "intents"),
    (["Write a Python function that parses a date", "Great. Who was Napoleon?"], "general"),
    (["Write a Python function that parses a date", "book a flight to Paris tomorrow"], "intents"),
    (["book a flight to Paris tomorrow", "Tell me a joke"], "general"),
    (["What's my bank balance?", "If I spend 15% of 80 dollars, how much is left?"], "math"),
    (["What is 15% of 80?", "请介绍一下法国大革命的历史和影响"], "general"),
    (["write a python class for a stack", "ok", "go on", "thanks", "continue", "more"], "code"),
]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.from_artifact(load_artifact(ARTIFACT))


@pytest.mark.parametrize(("label", "text"), [(k, t) for k, v in MUST.items() for t in v])
def test_demo_artifact_obvious_prompts_are_classified_right(
    classifier: Classifier, label: str, text: str
) -> None:
    assert classifier.classify(text).category == label


def test_demo_artifact_accuracy_on_held_out_prompts(classifier: Classifier) -> None:
    rows = [(label, text) for label, texts in HELD_OUT.items() for text in texts]
    wrong = [
        f"{label} as {found}: {text}"
        for label, text in rows
        if (found := classifier.classify(text).category) != label
    ]
    accuracy = 1 - len(wrong) / len(rows)
    assert len(rows) >= 80
    assert accuracy >= 0.93, wrong


def test_demo_artifact_accuracy_on_fresh_prompts(classifier: Classifier) -> None:
    rows = [(label, text) for label, texts in FRESH.items() for text in texts]
    wrong = [
        f"{label} as {found}: {text}"
        for label, text in rows
        if (found := classifier.classify(text).category) != label
    ]
    assert len(wrong) / len(rows) <= 0.15, wrong


def test_demo_artifact_accuracy_on_fresh_conversations(classifier: Classifier) -> None:
    wrong = [
        f"{label} as {found}: {turns}"
        for turns, label in FRESH_CONVERSATIONS
        if (found := classify_turns(classifier, turns).category) != label
    ]
    assert len(wrong) / len(FRESH_CONVERSATIONS) <= 0.25, wrong


def test_demo_artifact_conversations_keep_and_change_their_category(classifier: Classifier) -> None:
    wrong = [
        f"{label} as {found}: {turns}"
        for turns, label in CONVERSATIONS
        if (found := classify_turns(classifier, turns).category) != label
    ]
    assert len(wrong) <= len(CONVERSATIONS) // 12, wrong


def test_demo_artifact_hand_written_prompts_are_not_in_the_training_data() -> None:
    made = {text for label in HELD_OUT for text in templated(label, 2000, 1)}
    written = [text for texts in HELD_OUT.values() for text in texts]
    assert not made.intersection(written)
