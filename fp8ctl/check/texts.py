"""The fixed texts that servers are asked about. Data.

Prose, speech, code, numbers, tables and other languages, so that no kind of token decides
alone; about as long as each other, so that little is filled up. Written for this purpose.
Change a letter and records of earlier versions no longer compare: then raise `VERSION`.
"""

# ruff: noqa: E501, RUF001 -- texts are data, and some of them are Russian

from __future__ import annotations

from typing import Final

VERSION: Final = 1

CAP: Final = 30
"""Tokens of a text that count: with all texts some 1,050, a minute on two cores."""

TEXTS: Final[tuple[str, ...]] = (
    "The ferry leaves the island at seven in the morning and comes back before dark. In winter, "
    "when the sea is rough, it may stay in the harbour for two days, and the shop runs out of "
    "bread and milk.",
    "My grandmother kept her buttons in a tin that had once held biscuits. On rainy afternoons we "
    "were allowed to pour them out on the carpet and sort them by colour, by size, or by how much "
    "we liked them.",
    "A heat pump does not make heat; it moves heat from a cold place to a warm one. That takes "
    "work, but less than the heat that is moved, which is why one unit of electricity can bring "
    "three units of warmth into a house.",
    "The committee met on Tuesday to discuss the new bridge. Three members were in favour, two "
    "were against, and one had left early because of the snow, so the decision was put off until "
    "the first week of March.",
    "Water is made of hydrogen and oxygen. Salt is made of sodium and chlorine. Table sugar is "
    "made of carbon, hydrogen and oxygen. Rust is made of iron and oxygen, and often some water "
    "is bound in it as well.",
    "To bake a simple loaf, mix flour, water, salt and a little yeast. Let the dough rest under a "
    "cloth until it has doubled in size, fold it twice, wait again, and bake it in a very hot oven "
    "for about forty minutes.",
    "The capital of France is Paris, the capital of Italy is Rome, the capital of Japan is Tokyo, "
    "the capital of Egypt is Cairo, the capital of Canada is Ottawa, and the capital of Australia "
    "is Canberra, not Sydney.",
    "She opened the letter slowly, as if it might break. Inside was a single sheet of paper, "
    "folded twice, and a photograph of a house she had never seen, with her own name written "
    "above the door in white paint.",
    "Photosynthesis takes place in the chloroplasts of plant cells. Light is absorbed by "
    "chlorophyll, water is split, oxygen is released, and the energy is stored in sugar that the "
    "plant can use at night or in the winter.",
    '"Have you seen my keys?" he asked. "They were on the table a minute ago." "Which table?" '
    '"The one in the kitchen." She pointed at the dog, who looked at the floor and did not say '
    "anything at all.",
    "The Roman Empire was divided into provinces, each of which was ruled by a governor. Roads "
    "connected the provinces with the capital, and along the roads there were stations where "
    "messengers could change their horses.",
    "Dear Ms. Lindqvist, thank you for your message of 14 May. Unfortunately the part that you "
    "ordered is no longer made, but we can offer you a newer model at the same price. Please let "
    "us know by the end of the month.",
    "If a train travels at ninety kilometres an hour for two hours and then at sixty kilometres "
    "an hour for half an hour, it has covered two hundred and ten kilometres, so its average speed "
    "is eighty-four kilometres an hour.",
    "Once upon a time there was a miller who had a very small mill and a very large cat. Every "
    "evening the cat sat on the wheel, and every evening the miller asked it politely to get off, "
    "and it never did.",
    "Question: Why is the sky blue during the day and red in the evening?\nAnswer: Short waves of "
    "light are scattered by the air more than long ones. In the evening the light has to travel "
    "through more air, so the blue is lost on the way.",
    "1. Switch off the machine and pull the plug.\n2. Wait until the blade has stopped.\n3. Loosen "
    "the two screws on the left side.\n4. Lift the cover and remove the filter.\n5. Wash the filter "
    "in warm water and let it dry.",
    "The patient reported a dull pain in the left shoulder that had begun three weeks earlier. "
    "There was no fever and no swelling. An X-ray showed nothing unusual, and the doctor suggested "
    "rest and some gentle exercise.",
    "Interest rates rose by a quarter of a point on Thursday, as most analysts had expected. Shares "
    "of banks gained slightly, while builders and car makers lost ground. The euro was little "
    "changed against the dollar.",
    'def mean(values):\n    """Return the arithmetic mean of some numbers."""\n    total = 0.0\n'
    "    count = 0\n    for value in values:\n        total += value\n        count += 1\n    if count "
    '== 0:\n        raise ValueError("no values")\n    return total / count\n',
    "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 1; i < argc; i++) {\n"
    '        printf("%d: %s\\n", i, argv[i]);\n    }\n    return 0;\n}\n',
    "SELECT customers.name, COUNT(orders.id) AS number\nFROM customers\nLEFT JOIN orders ON "
    "orders.customer_id = customers.id\nWHERE customers.country = 'NO'\nGROUP BY customers.name\n"
    "ORDER BY number DESC\nLIMIT 10;\n",
    "function debounce(callback, delay) {\n  let timer = null;\n  return function (...args) {\n    "
    "clearTimeout(timer);\n    timer = setTimeout(() => callback.apply(this, args), delay);\n  };\n}\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        "
    "self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n\n    def "
    "is_empty(self):\n        return len(self.items) == 0\n",
    '{"name": "lamp", "price": 24.5, "tags": ["light", "desk"], "stock": {"Oslo": 3, '
    '"Lyon": 0, "Turin": 12}, "active": true, "replaces": null, "sizes": [10, 20, 30]}',
    "$ git status\nOn branch main\nYour branch is up to date with 'origin/main'.\n\nChanges not "
    'staged for commit:\n  (use "git add <file>..." to update what will be committed)\n\tmodified:   '
    "README.md\n",
    '<ul class="menu">\n  <li><a href="/">Home</a></li>\n  <li><a href="/about">About us</a></li>\n'
    '  <li><a href="/contact">Contact</a></li>\n</ul>\n<p>Copyright 2024. All rights reserved.</p>\n',
    "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, "
    "97, 101, 103, 107, 109, 113",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6\n4 + 4 = 8\n5 + 5 = 10\n6 + 6 = 12\n7 + 7 = 14\n8 + 8 = 16\n9 + 9 = "
    "18\n10 + 10 = 20\n",
    "Let f(x) = x^2 - 4x + 3. Then f'(x) = 2x - 4, which is zero at x = 2, where f has its minimum "
    "f(2) = -1. The roots of f are x = 1 and x = 3, since f(x) = (x - 1)(x - 3).",
    "| City | Country | Inhabitants |\n|---|---|---|\n| Bergen | Norway | 290,000 |\n| Graz | Austria | "
    "300,000 |\n| Porto | Portugal | 230,000 |\n| Ghent | Belgium | 265,000 |\n",
    "Der Zug nach Hamburg fährt heute von Gleis sieben ab und hat etwa zehn Minuten Verspätung. Wir "
    "bitten um Entschuldigung. Reisende nach Bremen steigen bitte in Hannover um.",
    "Le marché a lieu tous les samedis sur la place de l'église. On y trouve des légumes, du "
    "fromage, du poisson et des fleurs, et quand il fait beau, on peut y manger des crêpes.",
    "La biblioteca está abierta de lunes a viernes, de nueve de la mañana a ocho de la tarde. Los "
    "libros se pueden llevar a casa durante tres semanas, y las películas durante una.",
    "Nel cortile c'era un grande albero di fico, e d'estate i bambini salivano sui rami più bassi "
    "per raccogliere i frutti maturi prima che li mangiassero gli uccelli.",
    "春天来了,公园里的花都开了。孩子们在草地上放风筝,老人们坐在长椅上聊天。天气很好,不冷也不热。",
    "Зимой здесь рано темнеет, и в окнах домов уже в четыре часа зажигается свет. На реке лёд, "
    "и дети катаются на коньках до самого вечера.",
)
