"""Prompts made by ourselves for the demo router. Owns templates and their fillers.

Recorded prompts are questions of benchmarks; people also say hello, ask for a
joke and paste code. These templates stand for that, drawn with a seed, so that
a fit is reproducible. The hand-written test set in `tests/unit` shares no
template with them on purpose.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path

_PEOPLE = """Napoleon|Marie Curie|Cleopatra|Albert Einstein|Isaac Newton|Ada Lovelace|Gandhi|Mozart|
Shakespeare|Abraham Lincoln|Julius Caesar|Frida Kahlo|Nelson Mandela|Charles Darwin|Leonardo da Vinci|
Joan of Arc|Aristotle|Confucius|Beethoven|Queen Victoria|Genghis Khan|Martin Luther King|Galileo|
Florence Nightingale|Rosa Parks|Socrates|Vincent van Gogh|Jane Austen|Nikola Tesla|Alexander the Great"""
_TOPICS = """the Roman Empire|black holes|photosynthesis|the Cold War|volcanoes|quantum mechanics|jazz|
climate change|the Industrial Revolution|dinosaurs|the water cycle|democracy|inflation|the Renaissance|
vaccines|evolution|gravity|the human heart|Buddhism|plate tectonics|the Great Wall of China|tea|
the Silk Road|coral reefs|machine learning|the immune system|World War II|the moon landing|opera|
ancient Egypt|electric cars|the stock market|meditation|whales|the Vikings|DNA|rainbows|philosophy|
the Olympics|chess|coffee|the solar system|friendship|loneliness|the sea|autumn|artificial intelligence|
nuclear energy|the Black Death|bees|the Amazon rainforest|earthquakes|the United Nations|sleep"""
_PLACES = """France|Japan|Brazil|Kenya|Canada|Australia|Egypt|India|Norway|Peru|Germany|Mongolia|
Switzerland|Portugal|Vietnam|Iceland|Mexico|Turkey|Spain|Finland|Chile|Italy|Poland|Nigeria"""
_CREATIVE = """a lonely lighthouse|a dragon who is afraid of fire|two old friends|my grandmother's garden|
a robot learning to paint|a rainy day in the city|a cat that rules a kingdom|the last tree on earth|
a detective in Paris|a sailor lost at sea|the first day of school|a magical library|summer evenings"""
_LIFE = """sleep better|make new friends|learn to play the guitar|stay motivated|deal with stress|
prepare for a job interview|write a good essay|grow tomatoes|train for a marathon|stop procrastinating|
start a conversation|learn Spanish|be more confident|choose a good book|keep houseplants alive|
brew good coffee|get over a breakup|study for exams|take better photos|clean a wooden table"""
_GENERAL = """Hello|Hi|Hi there!|Hey|Good morning|Good evening, how are you?|Hello! How are you doing today?|
How are you?|What's up?|Hello, can you help me?|Hi, I have a question.|Can you help me with something?|
Who are you?|What are you?|What is your name?|Are you a human or a machine?|What can you do?|
Who made you?|Introduce yourself.|Tell me about yourself.|Nice to meet you|Thank you so much!|Goodbye|
See you later|You are very helpful|Tell me a joke|Tell me a funny joke about {topic}|Make me laugh.|
Tell me a story|Tell me a bedtime story about {creative}|Say something nice.|I feel sad today.|
I'm bored, entertain me|Who was {person}?|who was {person}|Tell me about {person}.|
What is {person} famous for?|When was {person} born?|Write a short biography of {person}|
Tell me about {topic}|tell me something interesting about {topic}|Explain {topic}.|
Explain {topic} to a five year old|Can you explain {topic} in simple words?|What is {topic}?|
what do you know about {topic}|Why is {topic} important?|How did {topic} begin?|
Give me a short history of {topic}|Write an essay about {topic}|Write a paragraph on {topic}|
Write a poem about {topic}|Write a poem about {creative}|Write a haiku about {topic}|
Compose a song about {creative}|Write a short story about {creative}|
Write the opening of a novel about {creative}.|Give me three facts about {topic}|
What are the pros and cons of {topic}?|Summarize the main ideas of {topic}.|Debate {topic} with me|
What is the capital of {place}?|Tell me about the history of {place}|What language do they speak in {place}?|
Describe the culture of {place}.|Who is the president of {place}?|What is the climate of {place} like?|
How can I {life}?|How do I {life}?|Give me some tips to {life}|Help me to {life}|
What is the best way to {life}?|I want to {life}. Any advice?|Write an email to my boss about being late|
Write a thank-you letter to my teacher|Write a cover letter for a job as a nurse|
Correct the grammar: she go to school every days|Rewrite this sentence more politely: give me that|
Summarize this text: {topic} has changed the way people live.|Translate to French: I love {topic}.|
Translate 'good night' into Spanish|What does the word serendipity mean?|Give me synonyms for happy|
What is the meaning of life?|What is love?|Do you believe in God?|What is your favourite colour?|
Suggest a name for my {creative} story|Recommend a good movie|What book should I read next?|
What should I cook tonight?|Give me a gift idea for my mother|Pretend you are {person} and greet me.|
Imagine a conversation between {person} and {person}|Compare {person} and {person}|
What is the difference between {topic} and {topic}?|Why is the sky blue?|Why do cats purr?|
How do airplanes fly?|What causes {topic}?|How does {topic} work?|Who invented the telephone?|
When did {topic} start?|Which planet is the largest?|What happened in 1969?|How tall is Mount Everest?|
How many people live in {place}?|List the largest cities of {place}|What is the currency of {place}?|
Is {topic} dangerous?|Act as a travel guide for {place}.|Continue the story: Once upon a time there was
{creative}|Which is better, {topic} or {topic}?|Give me an outline for a talk on {topic}|
Who wrote Hamlet?|I feel {feeling}. {wish}|I had a {feeling} week. {wish}|I'm so {feeling} today|
My friend is {feeling}. What can I say to him?|Why do people get {feeling}?|{wish}|
Suggest {count} names for a {namable}|Suggest a {suggestion}|Give me {count} ideas for a {suggestion}|
Recommend me a {suggestion}|What is a good {suggestion}?|What are some good {suggestion} ideas?|
What are the benefits of {topic}?|What are some {habit}?|What are the best {habit}?|Tell me some {habit}|
Give me a list of {habit}|Name {count} {habit}|Can you recommend some {habit}?|I'd like to learn about {topic}|
I am curious about {topic}|I don't understand {topic}. Can you help?|Let's talk about {topic}|
Do you like {topic}?|What do you think about {topic}?|Should I {life}?|My son wants to {life}. Is it a good idea?|
Write a letter to my {relation} about {topic}|Write a speech for my {relation}'s wedding|
Draft a message to my {relation} saying sorry|Help me write a birthday card for my {relation}|{foreign}|{foreign}|{foreign}|Explain the causes of {topic}|What did {person} do?|Was {person} a good leader?"""

_FEELINGS = (
    "sad|happy|lonely|tired|bored|anxious|angry|terrible|awful|stressed|excited|nervous|bad|great"
)
_WISHES = """Can you cheer me up?|Say something kind.|What should I do?|Any advice?|Talk to me.|
Motivate me|Give me a quote about courage|Tell me something positive|Can we chat a bit?|Inspire me."""
_SUGGESTIONS = """birthday party|present for my father|weekend activity|novel|film for tonight|hobby|
date night|family dinner|board game|school project|team name|slogan for a bakery|title for my essay|
new year's resolution|costume|picnic|museum visit|first date|podcast|poem to learn by heart"""
_NAMABLE = (
    "cat|dog|band|boat|baby girl|hamster|horse|café|bookshop|football team|character|parrot|blog"
)
_HABITS = """useful habits|famous painters|classic novels|ways to save water|healthy snacks|proverbs|
endangered animals|indoor games|wonders of the world|ways to relax|mythical creatures|types of clouds|
facts about space|rivers in Europe|musical instruments|synonyms for big|important inventions|desserts"""
_RELATIONS = (
    "mother|boss|teacher|neighbour|best friend|sister|grandfather|landlord|colleague|husband"
)
# Other languages are the base model's: it alone was trained on any.
_FOREIGN = """Bonjour, comment ça va ?|Raconte-moi une blague|Qui était Napoléon ?|
Explique-moi la photosynthèse|Quelle est la capitale du Japon ?|Écris un poème sur la mer|
Hallo, wie geht es dir?|Wer war Goethe?|Erzähl mir einen Witz|Erkläre mir die Relativitätstheorie|
Was ist die Hauptstadt von Frankreich?|Schreibe ein Gedicht über den Herbst|Hola, ¿cómo estás?|
¿Quién fue Simón Bolívar?|Cuéntame un chiste|Explícame la fotosíntesis|¿Cuál es la capital de Italia?|
Ciao, come stai?|Raccontami una storia|Chi era Garibaldi?|Olá, tudo bem?|Conte-me uma piada|
Quem foi Pelé?|Hallo, hoe gaat het?|Vertel me een verhaal|Cześć, jak się masz?|Opowiedz mi bajkę|
Привет, как дела?|Кто такой Пушкин?|Расскажи анекдот|Объясни, что такое гравитация|
Привіт, розкажи про Київ|你好|你是谁？|给我讲个笑话|请介绍一下北京|什么是光合作用？|写一首关于春天的诗|
こんにちは|あなたは誰ですか？|冗談を言ってください|日本の歴史について教えてください|안녕하세요|
당신은 누구입니까?|재미있는 이야기를 해 주세요|مرحبا كيف حالك|من كان صلاح الدين؟|أخبرني نكتة|
नमस्ते, आप कैसे हैं?|भारत के बारे में बताओ|Merhaba, nasılsın?|Bana bir hikaye anlat|שלום, מה שלומך?|
Xin chào, bạn khỏe không?|Γεια σου, τι κάνεις;|Πες μου ένα αστείο|สวัสดีครับ|Hej, hur mår du?|
Kerro minulle vitsi|Salut, ce mai faci?|Szia, hogy vagy?|Selamat pagi, apa kabar?|Habari yako?"""
_COUNTS = "two|three|five|ten|some|a few"

_FUNCTIONS = """reverses a string|checks whether a number is prime|computes the nth Fibonacci number|
sorts a list of dictionaries by a key|removes duplicates from a list|counts the words in a file|
merges two dictionaries|finds the longest common prefix|parses a date|reads a CSV file|
downloads a web page|flattens a nested list|validates an email address|computes a factorial|
converts Celsius to Fahrenheit|finds the maximum of a list|checks if a string is a palindrome|
performs a binary search|transposes a matrix|counts vowels in a string|generates random passwords|
returns the intersection of two lists|groups words that are anagrams|writes JSON to a file|
computes the greatest common divisor|rotates a list by k|traverses a binary tree in order|
caches its results|retries on failure|splits a list into chunks|computes a moving average|
opens a socket and sends a message|lists all files in a directory|logs its arguments|
capitalizes every word|converts a Roman numeral to an integer|finds the shortest path in a graph"""
_LANGUAGES = "Python|Python|Python|Python|JavaScript|Java|C++|C|Rust|Go|TypeScript|SQL|bash|Ruby"
_CONCEPTS = """list comprehension|decorator|generator|context manager|lambda function|class method|
dataclass|try and except block|for loop|while loop|f-string|virtual environment|regular expression|
dictionary comprehension|recursion|linked list|hash table|binary tree|stack|queue|async function|
unit test|property|iterator|metaclass|slice|set|tuple|thread|mutex|REST API|closure|import statement|
list|dictionary|string|global variable|abstract class|interface|pointer|heap|priority queue|trie|enum|
named tuple|event loop|coroutine|callback|docstring|keyword argument|default argument|package|module"""
_ALGORITHMS = """merge sort|bubble sort|heap sort|insertion sort|Dijkstra's algorithm|breadth-first search|
depth-first search|binary search|a hash map|a doubly linked list|a bloom filter|a trie|a ring buffer|
a thread pool|a rate limiter|matrix multiplication|the sieve of Eratosthenes|Levenshtein distance|
run-length encoding|a tokenizer|a stack with push and pop|tic-tac-toe|Conway's game of life|
an LRU cache|a key-value store|a web scraper|a calculator class|a TCP server|topological sort"""
_TOOLS = """git|docker|numpy|pandas|pytest|flask|django|matplotlib|asyncio|pip|npm|make|vim|sqlite|
requests|argparse|itertools|collections|logging|subprocess|threading|re|json|csv|typing|kubernetes|react"""
_TASKS = """rename a branch|undo the last commit|resolve a conflict|read a JSON file|plot a histogram|
filter rows of a dataframe|group by a column|join two tables|mock an object|parse command line arguments|
make an HTTP request|write to a log file|run a shell command|install a package|profile my code|
iterate over a dictionary|format a string|convert a string to an integer|remove an item from a list|
raise an exception|handle a timeout|start a new thread|build an image|squash commits|override a method"""
_SYMBOLS = """return|lambda|self|async|await|static|const|import|__init__|*args|**kwargs|enumerate|zip|
print|len|range|nonlocal|assert|with|pass|None|finally|isinstance|super|map|filter|sorted|void|public"""
_ERRORS = """TypeError: unsupported operand type(s) for +: 'int' and 'str'|
IndexError: list index out of range|KeyError: 'name'|AttributeError: 'NoneType' object has no attribute
'split'|ModuleNotFoundError: No module named 'requests'|SyntaxError: invalid syntax|
ValueError: invalid literal for int() with base 10|RecursionError: maximum recursion depth exceeded|
UnboundLocalError: local variable referenced before assignment|ZeroDivisionError: division by zero|
segmentation fault (core dumped)|NullPointerException|undefined is not a function"""
_SNIPPETS = (
    "def add(a, b):\n    return a + b",
    "for i in range(10):\n    print(i)",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
    "import os\n\nfor name in os.listdir('.'):\n    print(name)",
    "x = [1, 2, 3]\nprint(x[3])",
    "def f(n):\n    if n < 2:\n        return n\n    return f(n - 1) + f(n - 2)",
    "with open(path) as f:\n    data = f.read()",
    "const xs = [1, 2, 3].map(x => x * 2);",
    "SELECT name, COUNT(*) FROM users GROUP BY name;",
    '#include <stdio.h>\nint main() { printf("hi"); return 0; }',
    "try:\n    value = int(text)\nexcept ValueError:\n    value = None",
    "squares = [n * n for n in numbers if n % 2 == 0]",
    'public static void main(String[] args) { System.out.println("hi"); }',
    "async def main():\n    await asyncio.sleep(1)\n\nasyncio.run(main())",
)
_CODE = r"""Write a {language} function that {function}|write a {language} function that {function}|
Write a function in {language} which {function}.|Write {language} code that {function}|
Write a {language} program that {function}|Implement a function that {function} in {language}.|
Give me a {language} script that {function}|Create a {language} class that {function}|
I need a {language} function that {function}. Add type hints and a docstring.|
Show me how to write code that {function} in {language}|Can you code a function that {function}?|
How do I use a {concept} in {language}?|What is a {concept} in {language}?|
Explain how a {concept} works in {language}|Give me an example of a {concept} in {language}|
Why do I get "{error}"?|How do I fix this error: {error}|My {language} script fails with {error}|
What does this code do?\n{snippet}|Explain this code:\n```\n{snippet}\n```|
Fix the bug in this code:\n{snippet}|Refactor this:\n```python\n{snippet}\n```|
Add type hints to this function:\n{snippet}|Write unit tests for:\n{snippet}|
Complete the following function:\n{snippet}|Why is this slow?\n{snippet}|{snippet}|
Translate this code to {language}:\n{snippet}|Convert this to a {concept}:\n{snippet}|
Write a docstring for this function:\n{snippet}|Optimize this loop:\n{snippet}|
Write a unit test for a function that {function}|How can I sort a list in {language}?|
What is the difference between a {concept} and a {concept} in {language}?|
How do I install a package with pip?|How do I read a file line by line in {language}?|
Write a regular expression that matches phone numbers|Write a SQL query that counts users by country|
Debug my {language} program|Review this pull request:\n{snippet}|Implement a {concept} in {language}|
Use a {concept} to write a function that {function}|What is the time complexity of this?\n{snippet}|
Write the {language} method that {function}|
Implement {algorithm}|implement {algorithm} in {language}|Please implement {algorithm}.|
Code {algorithm} for me|Write {algorithm} from scratch|How would you implement {algorithm}?|
How do I {task} with {tool}?|how to {task} in {tool}|How can I {task} using {tool}?|
{tool}: how do I {task}?|I use {tool} and want to {task}. What is the command?|
What does {symbol} do in {language}?|What does `{symbol}` mean?|When should I use `{symbol}`?|
Explain the {symbol} keyword|My {tool} program crashes, what is wrong?|My code raises {error}, why?|
I get the error '{error}'. What am I doing wrong?|{tool} says '{error}'. How do I solve that?|
import {tool}\nHow do I {task}?|import {tool}\n\n{snippet}\nHow do I {task} here?|
The tests of my function fail, why?\n{snippet}|What is an object-oriented {concept}?|{language}: {function}|Write a one-liner that {function}"""

_NAMES = (
    "Anna|Ben|Carla|David|Emma|Farid|Grace|Hugo|Ines|Jamal|Kim|Lena|Marco|Nadia|Omar|Paula|Sam|Tom"
)
_THINGS = """apples|marbles|books|cookies|stickers|pencils|eggs|coins|cards|oranges|balloons|stamps|toys|
chickens|cows|flowers|cupcakes|bottles|sheep|tickets|candies|shirts|bricks|fish"""
_MATH = """What is {n}% of {n}?|what is {n} percent of {n}|What is {n} + {n}?|What is {n} times {n}?|
what's {n} minus {n}|Calculate {n} * {n} + {n}|Compute {n} / {s}|{n} + {n} = ?|{n}*{n}|{n} - {n}|
({n} + {s}) * {s}|How much is {n} divided by {s}?|What is the square root of {n}?|
Solve for x: {s}x + {s} = {n}|Solve {s}x - {n} = {n}|If x + {s} = {n}, what is x?|
What is the sum of {n}, {n} and {n}?|What is the average of {n}, {n} and {n}?|
Convert {s}/{s} to a percentage|What is {s}/{s} + {s}/{s}?|What is {s} to the power of {s}?|
{name} has {n} {thing} and buys {s} more. How many {thing} does {name} have?|
{name} had {n} {thing}. She gave {s} to {name}. How many are left?|
A shop sells {thing} for ${s} each. How much do {n} {thing} cost?|
There are {n} {thing} in {s} boxes. How many {thing} are in each box?|
{name} reads {s} pages a day. How many pages does {name} read in {s} weeks?|
A train travels {n} miles in {s} hours. What is its average speed?|
A train drives {n} km per hour for {s} hours. How far does it go?|
{name} is {s} years old and {name} is twice as old. How old will {name} be in {s} years?|
A rectangle is {s} cm long and {s} cm wide. What is its area?|What is the perimeter of a square with side {s}?|
A shirt costs ${n} and is discounted by {s}%. What is the final price?|
{name} earns ${s} per hour and works {n} hours. How much money does {name} earn?|
If {s} workers build a wall in {s} days, how long do {s} workers need?|
{name} splits {n} {thing} equally among {s} friends. How many does each friend get?|
Half of {n} plus a third of {n} is what?|How many minutes are in {s} hours?|
A recipe needs {s} cups of flour for {s} cakes. How many cups for {n} cakes?|
{name} and {name} have {n} {thing} together. {name} has {s} more than {name}. How many has each?|
Simplify {s}(x + {s}) - {s}x|What is the derivative of {s}x^2 + {s}x?|Factor x^2 - {s}x + {s}|
What is the probability of rolling a {s} with two dice?|Find the next number: {s}, {s}, {s}|
Is {n} a prime number?|What is the greatest common divisor of {n} and {n}?|
A tank holds {n} liters and loses {s} liters per hour. After how many hours is it empty?|
Find the area of a circle with radius {s}|How many seconds are there in {s} days?|{s}! = ?|
I invest ${n} at {s}% interest per year. How much do I have after {s} years?"""
_INTENTS = """what's my bank balance?|What is my account balance|How much money is in my checking account?|
book a flight to {city} tomorrow|book me a flight from {city} to {city}|I need a hotel in {city} for friday|
set an alarm for {s} am|wake me up at {s}|set a timer for {s} minutes|remind me to call {name}|
what's the weather in {city}|will it rain in {city} tomorrow?|play some jazz|play the next song|
turn off the lights|turn on the kitchen light|transfer ${n} from savings to checking|
pay my electricity bill|my card was declined|I lost my credit card|freeze my account please|
what's my credit score|order more checks|text {name} that I'm late|call {name}|
find me a table for {s} at an Italian restaurant|make a reservation for {s} people tonight|
how is the traffic to {city}|how do I get to the airport|is my flight on time|rent a car in {city}|
where is my lost luggage|what time is it in {city}|schedule a meeting with {name} at {s}|
add milk to my shopping list|what's on my to do list|what's on my calendar for friday|
when is my bill due|report fraud on my card|change my pin|what's my credit limit|
how many vacation days do I have|when is payday|where did I put my phone, find it|
order me an uber to the station|do I need a visa for {place}|set up direct deposit|
is there a travel alert for {place}|what is the exchange rate for {place}|what song is this"""
_CITIES = "Paris|London|Tokyo|Berlin|New York|Boston|Rome|Madrid|Chicago|Oslo|Dubai|Seattle|Lima"


def _list(text: str) -> list[str]:
    return [item.replace("\n", " ").strip() for item in text.split("|")]


_FILL = {
    "person": _list(_PEOPLE),
    "topic": _list(_TOPICS),
    "place": _list(_PLACES),
    "creative": _list(_CREATIVE),
    "life": _list(_LIFE),
    "function": _list(_FUNCTIONS),
    "language": _list(_LANGUAGES),
    "concept": _list(_CONCEPTS),
    "error": _list(_ERRORS),
    "snippet": list(_SNIPPETS),
    "name": _list(_NAMES),
    "thing": _list(_THINGS),
    "city": _list(_CITIES),
    "algorithm": _list(_ALGORITHMS),
    "tool": _list(_TOOLS),
    "task": _list(_TASKS),
    "symbol": _list(_SYMBOLS),
    "feeling": _list(_FEELINGS),
    "wish": _list(_WISHES),
    "suggestion": _list(_SUGGESTIONS),
    "namable": _list(_NAMABLE),
    "habit": _list(_HABITS),
    "relation": _list(_RELATIONS),
    "foreign": _list(_FOREIGN),
    "count": _list(_COUNTS),
}
_TEMPLATES = {
    "general": _list(_GENERAL),
    "code": [item.replace("\\n", "\n") for item in _list(_CODE)],
    "math": _list(_MATH),
    "intents": _list(_INTENTS),
}


def templated(label: str, count: int, seed: int) -> list[str]:
    """`count` prompts of one category, each template in turn, fillers drawn with `seed`."""
    draw = random.Random(f"{label}/{seed}")
    templates = _TEMPLATES[label]
    return [_fill(templates[i % len(templates)], draw) for i in range(count)]


def _fill(template: str, draw: random.Random) -> str:
    parts = template.split("{")
    out = [parts[0]]
    for part in parts[1:]:
        name, brace, rest = part.partition("}")
        if brace and name == "n":
            out.append(str(draw.choice((draw.randint(2, 99), draw.randint(10, 5000)))))
        elif brace and name == "s":
            out.append(str(draw.randint(2, 12)))
        elif brace and name in _FILL:
            out.append(draw.choice(_FILL[name]))
        else:  # braces of code
            out.append("{" + name + brace)
        out.append(rest)
    text = "".join(out)
    shape = draw.random()  # people are careless with capitals and full stops
    if "\n" not in text and shape < 0.25:
        text = text.lower().rstrip("?.!")
    return text


def library_functions(count: int, seed: int) -> list[str]:
    """Requests for functions of this Python's own standard library, made from their docstrings.

    Half ask in words for what the docstring's first line says, half give
    signature and docstring to be completed. Fewer where the library is not
    installed as source.
    """
    draw = random.Random(f"library/{seed}")
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if {"test", "tests", "idlelib", "site-packages", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            doc = ast.get_docstring(node)
            if not doc or not 20 <= len(doc) <= 1500:
                continue
            head = f"def {node.name}({ast.unparse(node.args)}):"
            first = doc.splitlines()[0].rstrip(".")
            found.append(
                draw.choice(
                    (
                        f"Write a Python function `{node.name}({ast.unparse(node.args)})`: {first}.",
                        f"Implement this in Python: {doc}",
                        f'{head}\n    """{doc}"""\n',
                        f"Complete this function:\n{head}\n    # {first}",
                        f"Write a function to {first[0].lower()}{first[1:]}.",
                    )
                )
            )
    draw.shuffle(found)
    return found[:count]
