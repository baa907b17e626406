"""Templates of the shipped conversations' prompts, and words to fill their slots.

This file is nothing but text. ``data.make.generate`` picks a template and fills it.
"""

from collections.abc import Sequence

SLOTS: dict[str, Sequence[str] | Sequence[int]] = {
    "tiny": range(2, 10),
    "small": range(6, 20),
    "medium": range(21, 99),
    "large": range(105, 990),
    "percent": (5, 10, 15, 20, 25, 30, 35, 40, 60, 75),
    "decimal": ("0.4", "1.25", "2.5", "3.75", "4.2", "6.5", "7.8", "12.5", "19.9"),
    "fraction": ("1/2", "1/3", "3/4", "2/5", "5/6", "3/8", "4/7", "5/9", "7/10"),
    "name": (
        "Amara", "Bruno", "Chiara", "Deniz", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas",
        "Kofi", "Leila", "Mateo", "Nadia", "Oskar", "Priya", "Rosa", "Samir", "Tomas", "Uma",
        "Viktor", "Wanda", "Yuki", "Zoe",
    ),
    "thing": (
        "notebooks", "candles", "postcards", "tulip bulbs", "lanterns", "wooden spoons", "kites",
        "clay mugs", "marbles", "stamps", "buttons", "comic books", "seed packets", "puzzles",
        "scarves", "jars of honey",
    ),
    "shop": (
        "bakery", "bookshop", "garden centre", "bike workshop", "toy shop", "flower stall",
        "fish market", "pottery studio", "music shop",
    ),
    "vehicle": ("tram", "ferry", "delivery van", "cargo bike", "night train", "bus", "canoe"),
    "language": ("Python", "Python", "Python", "JavaScript", "Java", "Go", "C", "Ruby", "Rust"),
    "data": (
        "temperatures", "order totals", "file sizes", "test scores", "ages", "prices",
        "page counts", "heart rates", "rainfall readings", "delivery times", "word lengths",
    ),
    "field": ("name", "city", "colour", "year", "author", "category", "country", "status"),
    "record": (
        "books", "songs", "customers", "invoices", "recipes", "plants", "tickets", "bicycles",
        "students", "parcels",
    ),
    "concept": (
        "recursion", "a hash table", "a stack", "a queue", "a linked list", "binary search",
        "a regular expression", "an exception", "a closure", "a race condition", "an API",
        "unit testing", "version control", "a primary key", "caching", "a pointer",
    ),
    "class": (
        "BankAccount", "Playlist", "Thermostat", "ShoppingCart", "Elevator", "Library",
        "ParkingLot", "Counter", "Inventory", "Timer",
    ),
    "animal": (
        "otter", "owl", "hedgehog", "octopus", "goat", "crow", "turtle", "bat", "fox", "bee",
        "penguin", "camel",
    ),
    "city": (
        "Lisbon", "Kyoto", "Montreal", "Nairobi", "Krakow", "Lima", "Istanbul", "Oslo", "Hanoi",
        "Edinburgh", "Marrakesh", "Melbourne",
    ),
    "food": (
        "lentil soup", "flatbread", "apple crumble", "fried rice", "tomato sauce", "pancakes",
        "potato salad", "hummus", "vegetable curry", "scrambled eggs", "oat cookies",
    ),
    "hobby": (
        "watercolour painting", "chess", "birdwatching", "knitting", "bouldering", "gardening",
        "playing the ukulele", "astronomy", "baking bread", "photography", "running", "pottery",
    ),
    "job": (
        "nurse", "carpenter", "librarian", "pilot", "beekeeper", "translator", "firefighter",
        "architect", "baker", "geologist", "teacher",
    ),
    "science": (
        "the tides", "a rainbow", "photosynthesis", "magnetism", "an earthquake", "fermentation",
        "the seasons", "static electricity", "a solar eclipse", "echoes", "evaporation",
        "the northern lights", "rust", "yeast making dough rise",
    ),
    "habit": (
        "going to bed earlier", "reading every day", "drinking more water", "saving money",
        "stretching in the morning", "using the phone less", "cooking at home", "walking to work",
    ),
    "place": (
        "an old lighthouse", "a mountain hut", "a night market", "an empty railway station",
        "a rooftop garden", "a small island", "a repair shop", "a library after closing time",
    ),
    "event": (
        "a birthday party", "a neighbourhood clean-up", "a school concert", "a picnic",
        "a book swap", "a farewell lunch", "a chess evening", "a housewarming",
    ),
    "quality": ("patience", "curiosity", "honesty", "courage", "kindness", "humour", "discipline"),
    "mood": ("cheerful", "mysterious", "gentle", "funny", "melancholic", "hopeful"),
}  # fmt: skip

# Ordered, within a domain, from short to long answers: neighbours share a batch.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "math": (
        "What is {medium} + {large}?",
        "Is {large} divisible by {tiny}? Say how you know in one sentence.",
        "Round {decimal} to the nearest whole number and say why.",
        "Which is larger, {fraction} or {fraction2}? Explain briefly.",
        "Write {fraction} as a decimal and as a percentage.",
        "How many minutes are there in {small} hours and {medium} minutes?",
        "Convert {medium} kilometres into metres and explain the step.",
        "What is {percent}% of {large}?",
        "Calculate {medium} x {small} in your head and tell me the trick you used.",
        "A clock shows {tiny}:15. What time will it show {large} minutes later?",
        "What is the remainder when {large} is divided by {small}?",
        "Find the average of {medium}, {medium2} and {medium3}.",
        "Simplify the expression {tiny}x + {small}x - {tiny2}.",
        "A square has an area of {tiny}{tiny2}0 square centimetres. How long is one side, roughly?",
        "Solve {tiny}x + {medium} = {large} for x.",
        "The sum of two consecutive numbers is {medium}. Can both be whole numbers? Explain.",
        "{name} has {medium} {thing} and gives {small} of them to {name2}. How many are left?",
        "One of the {thing} at the {shop} costs {decimal} euros. What do {small} of them cost?",
        "A {vehicle} covers {medium} kilometres in an hour. How far does it get in {tiny} hours?",
        "Write {large} as a product of prime factors.",
        "What is the area of a rectangle that is {medium} cm long and {decimal} cm wide?",
        "What is the circumference of a circle with a radius of {small} cm? Use 3.14 for pi.",
        "{name} saves {small} euros a week. After how many weeks are there {large} euros?",
        "The {shop} lowers the price of a {large} euro item by {percent}%. What is the new price?",
        "A recipe for {tiny} people needs {large} grams of flour. How much is it for {small}?",
        "{name} is {small} years older than {name2}. Together they are {medium} years old. "
        "How old is each of them?",
        "A tank holds {large} litres and loses {tiny} litres an hour. When is it half empty?",
        "In a box there are {small} red and {tiny} blue {thing}. What is the chance of drawing "
        "a blue one?",
        "{name} packs {large} {thing} into boxes of {small}. How many full boxes are there, and "
        "how many {thing} are left over?",
        "The {vehicle} leaves at {tiny}:40 and needs {large} minutes. When does it arrive? "
        "Show your steps.",
        "Find the next three terms of the sequence {tiny}, {small}, {medium} if every term is the "
        "one before plus a growing step. Say which rule you chose.",
        "Two numbers add up to {medium} and their difference is {tiny}. Find them step by step.",
        "Expand (x + {tiny})(x - {small}) and explain every step.",
        "Solve the system x + y = {medium} and x - y = {small}.",
        "Find the roots of x^2 - {small}x + {tiny} = 0, or say that there are none.",
        "{name} walks {tiny} km north and then {small} km east. How far from the start is that "
        "in a straight line?",
        "The {shop} sold {medium} {thing} on Monday, {percent}% more on Tuesday and {tiny} fewer "
        "on Wednesday than on Tuesday. How many were sold on each day?",
        "How many ways are there to arrange {tiny} different {thing} on a shelf? Explain the "
        "idea first.",
        "{name} invests {large} euros at {percent}% interest a year. How much is it after "
        "{tiny} years? Show the value for each year.",
        "A {vehicle} travels {large} km at {medium} km/h and returns at {medium2} km/h. What is "
        "the average speed of the round trip?",
        "Explain to a twelve-year-old how to add {fraction} and {fraction2}, and work it out.",
        "Prove that the sum of {tiny} even numbers is always even.",
        "Explain what a percentage is, using {thing} and the number {large} as an example.",
        "Make up a word problem about {thing} whose answer is {medium}, then solve it.",
        "Explain long division with the example {large} divided by {small}.",
    ),
    "code": (
        "In {language}, how do I get the length of a string? One line, please.",
        "Which {language} operator gives the remainder of a division? Show {medium} and {tiny}.",
        "In one sentence, what is {concept}?",
        "Write a regular expression that matches a number with exactly {tiny} digits.",
        "Write a shell command that counts the files in a folder named {record}.",
        "Write an SQL query that returns all {record} ordered by {field}.",
        "Write an SQL query that counts the {record} for each {field}.",
        "Show me a {language} one-liner that builds a list of the squares up to {small}.",
        "How do I reverse a list of {data} in {language}?",
        "How do I read a text file named {record}.txt line by line in {language}?",
        "What does `{record}[{tiny}:]` do in Python? Give a short example.",
        "What does the Python error `KeyError: '{field}'` mean and how can I avoid it?",
        "Write a Python function that returns the largest of a list of {data}.",
        "Write a Python function that counts how many {data} are above {medium}.",
        "Write a Python function that removes duplicates from a list of {record}, keeping order.",
        "Write a {language} function that checks if a number is divisible by {tiny} and {small}.",
        "Write a {language} function that computes the average of an array of {data}.",
        "Write a {language} loop that prints every multiple of {tiny} up to {large}.",
        "Write a {language} function that converts minutes into hours and minutes.",
        "Write a Python dictionary comprehension that maps each of the {record} to its {field}.",
        "Write a Python function that groups {record} by {field}.",
        "Write a Python function that finds the two smallest {data} in a list.",
        "Write a Python function that returns the moving average of {data} with a window of "
        "{tiny}.",
        "Write a {language} function that counts the vowels of a sentence.",
        "Write a {language} function that checks whether two words use the same letters.",
        "Write a Python function that splits a list of {record} into chunks of {tiny}.",
        "Write a Python function that merges two sorted lists of {data}.",
        "Write a Python generator that yields {data} one by one until one exceeds {large}.",
        "Write a Python decorator that prints how long a function took to load {record}.",
        "Write a Python function that loads {record} from a CSV file and returns those whose "
        "{field} is not empty.",
        "Write a Python function that retries an action {tiny} times before it gives up.",
        "Write a Python dataclass for {record} with the fields {field} and {field2}, and create "
        "one.",
        "Write a unit test for a function `add_{field}` that appends a {field} to a list.",
        "Write a function in {language} that returns the first {small} Fibonacci numbers.",
        "Write the HTML for a table of {record} with the columns {field} and {field2}.",
        "Write a CSS rule set that shows {record} as cards, {tiny} in a row.",
        "Refactor this Python code so that it is easier to read:\n\n"
        "```python\ndef f(l):\n    r = []\n    for i in range(len(l)):\n"
        "        if l[i] > {medium}:\n            r.append(l[i] * {tiny})\n    return r\n```",
        "Find the bug in this Python function and fix it:\n\n"
        "```python\ndef mean(values):\n    total = {tiny}\n    for value in values:\n"
        "        total += value\n    return total / len(values)\n```",
        "What does this Python code print, and why?\n\n"
        "```python\nvalues = [{tiny}, {small}, {medium}]\n"
        "for i, value in enumerate(values):\n    print(i, value * i)\n```",
        "Explain {concept} to a beginner, with a small {language} example.",
        "What is the difference between {concept} and {concept2}?",
        "Write a Python class `{class}` with two methods and show how to use it.",
        "Write a {language} program that asks for a number and guesses it within {small} tries.",
        "Write a small command line tool in Python that adds, lists and removes {record}.",
        "Describe step by step how you would test a program that sorts {record} by {field}.",
    ),
    "chat": (
        "Suggest a name for a pet {animal}.",
        "What should I wear for a rainy day in {city}? One sentence.",
        "Say thank you to {name}, a {job}, in one warm sentence.",
        "Give me a fun fact about the {animal}.",
        "Translate 'Where is the {shop}?' into French and Spanish.",
        "Suggest a title for a story about {place}.",
        "What do you call someone who is interested in {hobby}?",
        "Is it hard to start with {hobby}? Answer in two sentences.",
        "Write a haiku about {place}.",
        "In two or three sentences, what causes {science}?",
        "Rewrite this more politely: '{name}, send me the list of {thing} now.'",
        "Correct the grammar: 'Yesterday {name} go to the {shop} and buyed {tiny} {thing}.'",
        "Write a short invitation to {event}.",
        "Give me three reasons to visit {city}.",
        "Give me {tiny} synonyms or phrases for {quality}.",
        "What goes well with {food}?",
        "Write a riddle whose answer is '{animal}'.",
        "Write a text message that tells {name} that I am {medium} minutes late for {event}.",
        "List {tiny} things to pack for a weekend in {city}.",
        "Write a product description for hand-made {thing} in three sentences.",
        "Describe {place} to someone who can't see it, in one paragraph.",
        "What does a {job} do on a normal day? Keep it short.",
        "How do I know if {hobby} is the right hobby for me?",
        "Explain {science} to a child of {tiny}.",
        "Summarise in two sentences why {quality} matters for a {job}.",
        "My friend {name} is sad after losing a job as a {job}. What could I say?",
        "Write a {mood} poem of two stanzas about {place}.",
        "Write a short dialogue between a {job} and a customer of a {shop}.",
        "Give me {tiny} questions to ask a {job} in an interview.",
        "How do I make {food}? Give me the ingredients and the steps.",
        "I have only {food} ingredients and {medium} minutes. What can I cook for {tiny} people?",
        "Write a polite email to the {shop} because the {thing} arrived broken.",
        "Write a {mood} story of about 100 words about a {animal} and a {job}.",
        "Plan one relaxed day in {city} for {name} and {name2}, in three short points.",
        "Give me {tiny} short tips for {habit}.",
        "How can a {job} find time for {hobby}?",
        "Compare living in {city} with living in {city2} in one paragraph.",
        "Is {quality} more important than {quality2}? Give one reason for each side.",
        "Invent a simple game that {tiny} people can play with {thing}.",
        "Describe how {event} could be organised with {large} euros.",
        "Write a toast of four sentences for {event} of {name}, a {job}.",
        "Name two pros and two cons of {habit}.",
        "Write the first paragraph of a {mood} novel that is set in {place} near {city}.",
        "Make a four-week plan for someone who starts with {hobby}. One line a week.",
        "How did people explain {science} in the past, and how do we today? Be brief.",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "math": (
        "Can you check that with different numbers, say {medium} and {small}?",
        "Are you sure? Please check your result another way.",
        "Explain the first step again, more slowly.",
        "What changes if the first number is doubled?",
        "Now write the same as a single formula.",
        "Give me a similar exercise to practise, without the solution.",
        "How would you estimate this without a calculator?",
        "Which mistake do people usually make here?",
        "What is the general rule behind this?",
        "Now answer in one short sentence.",
        "Could you explain that to {name}, who is ten years old?",
        "And what would it be with {large} instead?",
    ),
    "code": (
        "Can you add a comment to each line?",
        "What happens if the input is empty?",
        "Now write it in Python if it isn't, or in JavaScript if it is.",
        "Please add a short test for it.",
        "How fast is it for {large} items?",
        "Can you make it shorter?",
        "Use clearer names, please.",
        "Show an example with its output.",
        "How would you handle invalid input?",
        "Explain it to someone who has never programmed.",
        "What would you change to use it on {record}?",
        "Is there a built-in way to do this?",
    ),
    "chat": (
        "Can you make it shorter?",
        "Make it a bit more {mood}.",
        "Why do you think so?",
        "Give me one more, please, and a different one.",
        "What would {name}, a {job}, say about it?",
        "Now say it as if you were talking to a child.",
        "Which part of this is the most important?",
        "Can you give an example?",
        "I have only {small} minutes. What should I start with?",
        "Is there anything that I should avoid?",
        "Turn that into a list of three points.",
        "And how would it be in {city}?",
    ),
}

SYSTEM_MESSAGES: dict[str, tuple[str, ...]] = {
    "math": (
        "You are a patient maths tutor. Show short, clear steps.",
        "You answer maths questions. End with a line that starts with 'Answer:'.",
        "You are a careful assistant who checks every calculation.",
        "Answer as briefly as you can.",
    ),
    "code": (
        "You are a senior programmer. Prefer simple code to clever code.",
        "You are a programming assistant. Put code into fenced blocks.",
        "You help beginners to program. Avoid jargon.",
        "Answer with code first and then one sentence of explanation.",
    ),
    "chat": (
        "You are a friendly assistant. Keep answers short.",
        "You are a helpful assistant who writes plain English.",
        "You are a witty companion who likes examples.",
        "Answer in at most three sentences.",
    ),
}
