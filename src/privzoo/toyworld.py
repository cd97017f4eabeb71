"""A small generated world: one public corpus and three private tasks, with nothing to download.

The world is a town whose people write opinions, whose guide lists its restaurants, and whose signs are textured shapes.
Its PUBLIC part (`public_text`, `public_images`) is what the embedded tiny models are pretrained on. Its PRIVATE part
(`text_rows`, `lm_rows`, `image_rows`) comes from the same world with another distribution, so that a pretrained model
has something to give and something to learn:

- text: the two parts never join the same noun to the same adjective; contrast is more than twice as common in the
  private part; public opinions are followed by what came of them ("so we came back smiling ."), private ones carry a
  label instead.
- listings: the two parts share words, not restaurants (a restaurant is a name with its kind of food) and not sentences.
- images: the two parts have no shape in common.

Guarantees: every function returns the same rows on every call, machine and PYTHONHASHSEED (fixed seeds, integer
arithmetic); within a task all rows of both splits differ; labels are exactly balanced; every private word occurs in
the public part. Rows are fresh objects: a caller may change them.
"""

import random

import numpy as np

LABEL_NOISE = 0.03
"""Share of toy_text's labels that are flipped, in both splits: no classifier can be expected to pass 97 %."""

IMAGE_SIZE = 16
PRIVATE_SHAPES = ("disc", "diamond", "plus", "frame")
PUBLIC_SHAPES = ("square", "wedge_up", "wedge_down", "ring", "saltire", "bar_across", "bar_upright", "corner")

_SIZES = {
    "text": {"train": 8000, "validation": 1000},
    "lm": {"train": 4000, "validation": 500},
    "images": {"train": 4000, "validation": 500},
}
PUBLIC_OPINIONS = 9000
_PUBLIC_LISTINGS, _PUBLIC_IMAGES = 5000, 12000

_NOUNS = [
    "soup", "pasta", "curry", "bread", "salad", "coffee", "cake", "wine", "service", "room", "view", "music",
    "staff", "film", "story", "acting", "ending", "garden", "breakfast", "museum",
]  # fmt: skip
_ADJECTIVES = {
    1: [
        "good", "great", "lovely", "superb", "pleasant", "charming", "excellent", "wonderful", "delightful",
        "fine", "brilliant", "splendid",
    ],
    -1: [
        "bad", "awful", "bland", "dull", "dreadful", "horrible", "poor", "nasty", "terrible", "boring",
        "shabby", "miserable",
    ],
}  # fmt: skip
_VERBS = {1: ["liked", "loved", "enjoyed", "praised"], -1: ["hated", "disliked", "regretted", "cursed"]}
_PEOPLE = ["we", "they", "i", "you", "everybody", "anna", "peter"]
_STRENGTH = ["very", "really", "quite", "so", "rather"]
_DETAIL = ["small", "large", "local", "famous", "old", "new"]
_OUTCOMES = {
    1: [
        "so we came back smiling for the {noun} .",
        "happy about it we gave five stars to the {noun} .",
        "friends should go soon and see the {noun} .",
        "what made the evening a joy was the {noun} .",
        "we left a big tip and thanked the owner for the {noun} .",
    ],
    -1: [
        "so we left early frowning at the {noun} .",
        "upset about it we gave one star to the {noun} .",
        "friends should stay away and forget the {noun} .",
        "what made the evening a pain was the {noun} .",
        "we left no tip and sued the owner for the {noun} .",
    ],
}

_NAMES = [
    "Aroma", "Bento", "Corner", "Dune", "Ember", "Fennel", "Grove", "Harvest", "Iris", "Juniper", "Kettle",
    "Lantern", "Mango", "Nettle", "Olive", "Pepper", "Quince", "Raven", "Saffron", "Thistle", "Umber",
    "Velvet", "Willow", "Yarrow", "Zephyr", "Anchor", "Basil", "Clove", "Drift", "Elm", "Fig", "Ginger",
    "Heron", "Ivy", "Jasmine", "Kestrel", "Laurel", "Maple", "Nutmeg", "Otter", "Plum", "Quill", "Rosemary",
    "Sage", "Tulip", "Urchin", "Vine", "Walnut",
]  # fmt: skip
_FOODS = [
    "thai", "italian", "indian", "french", "greek", "english", "chinese", "spanish", "turkish", "mexican", "polish",
    "korean",
]  # fmt: skip
_AREAS = {
    "riverside": "by the riverside",
    "centre": "in the city centre",
    "station": "near the station",
    "harbour": "at the harbour",
    "hill": "on the hill",
    "park": "next to the park",
    "market": "behind the market",
    "bridge": "under the bridge",
    "church": "opposite the church",
    "beach": "along the beach",
}
_PRICES = {"low": "cheap", "fair": "moderate", "high": "costly"}
_PUBLIC_TEMPLATES = [
    "{name} is a {price} {food} place {area} .",
    "the place called {name} {area} is {price} and {food} .",
    "there is a {price} place {area} , it serves {food} food , its name is {name} .",
    "for {food} dishes at {price} prices go to {name} {area} .",
]
_PRIVATE_TEMPLATES = [
    "{name} serves {food} food {area} at {price} prices .",
    "{area} there is {name} , a {price} {food} place .",
    "{name} is a place {area} , it serves {price} {food} dishes .",
]


def public_text() -> list[str]:
    """The public corpus: 9,000 opinions with what came of them, then 5,000 listings with their description.

    A document is a line of words parted by single blanks. A listing has a "=" between its fields and its text, as in
    "name : Aroma ; food : thai ; area : hill ; price : low = Aroma is a cheap thai place on the hill ."; no opinion
    has one.
    """
    rng = random.Random(11)
    opinions = []
    for i in range(PUBLIC_OPINIONS):
        polarity = 1 if i % 2 else -1
        opinion, noun = _opinion(rng, polarity, private=False, weights=(50, 40, 10))
        opinions.append(f"{opinion} {rng.choice(_OUTCOMES[polarity]).format(noun=noun)}")
    listings = [_listing(rng, private=False) for _ in range(_PUBLIC_LISTINGS)]
    return opinions + [f"{fields} = {text}" for fields, text in listings]


def text_rows(split: str) -> list[dict]:
    """Rows {"text": str, "label": int} of toy_text: is an opinion of 6 to 14 words good (1) or bad (0)?

    A last-clause rule decides contrasts ("the soup was great but the staff was awful ." is bad) and a negation turns
    an adjective over, so that counting words is not enough. In each split half of the rows carry each label, and
    LABEL_NOISE of the labels, as many of either kind, are wrong.

    Args:
        split: "train" (8,000 rows) or "validation" (1,000 rows).
    """
    rng = random.Random(12)
    seen: set[str] = set()
    for name, size in _SIZES["text"].items():
        rows = []
        for i in range(size):
            label = i % 2
            text = _opinion(rng, 2 * label - 1, private=True, weights=(40, 35, 25))[0]
            while text in seen:
                text = _opinion(rng, 2 * label - 1, private=True, weights=(40, 35, 25))[0]
            seen.add(text)
            # Rows i and i+1 have opposite labels and are flipped together, so the noise keeps the balance.
            flip = (i // 2) % round(1 / LABEL_NOISE) == 0
            rows.append({"text": text, "label": 1 - label if flip else label})
        rng.shuffle(rows)
        if name == split:
            return rows
    raise ValueError(f"Expected split={split!r} in {list(_SIZES['text'])}.")


def lm_rows(split: str) -> list[dict]:
    """Rows {"prompt": str, "target": str} of toy_lm: the fields of a restaurant, and a sentence that says them all.

    No two rows, of either split, are about the same fields, in whatever order. Three ways of saying them are equally
    likely, so that the best perplexity is above 1.

    Args:
        split: "train" (4,000 rows) or "validation" (500 rows).
    """
    rng = random.Random(13)
    seen: set[str] = set()
    for name, size in _SIZES["lm"].items():
        rows: list[dict] = []
        while len(rows) < size:
            fields, text = _listing(rng, private=True)
            restaurant = " ; ".join(sorted(fields.split(" ; ")))
            if restaurant not in seen:
                seen.add(restaurant)
                rows.append({"prompt": fields, "target": text})
        if name == split:
            return rows
    raise ValueError(f"Expected split={split!r} in {list(_SIZES['lm'])}.")


def image_rows(split: str) -> list[dict]:
    """Rows {"image": uint8 array (16, 16, 3), "label": int} of toy_images: which of PRIVATE_SHAPES is it?

    Place, size, colours, textures (of figure and ground alike) and noise are random and tell nothing of the label.

    Args:
        split: "train" (4,000 rows) or "validation" (500 rows), each with as many rows of every label.
    """
    for seed, (name, size) in enumerate(_SIZES["images"].items(), start=14):
        if name == split:
            return _image_rows(np.random.default_rng(seed), PRIVATE_SHAPES, size)
    raise ValueError(f"Expected split={split!r} in {list(_SIZES['images'])}.")


def public_images() -> list[dict]:
    """12,000 rows as those of `image_rows`, of the eight PUBLIC_SHAPES, for pretraining."""
    return _image_rows(np.random.default_rng(16), PUBLIC_SHAPES, _PUBLIC_IMAGES)


def _opinion(rng: random.Random, polarity: int, private: bool, weights: tuple[int, int, int]) -> tuple[str, str]:
    """A sentence of the given polarity (1 or -1), 6 to 14 words long, and the noun that it is about in the end.

    weights: of plain, negated and contrasted sentences.
    """
    while True:
        kind = rng.choices(("plain", "negated", "contrasted"), weights)[0]
        text, noun = _clause(rng, polarity, private, rng.random() < 0.3 if kind == "contrasted" else kind == "negated")
        if kind == "contrasted":
            first, _ = _clause(rng, -polarity, private, rng.random() < 0.3)
            text = rng.choice([f"{first} but {text} .", f"although {first} , {text} ."])
        else:
            if rng.random() < 0.5:
                text = f"{_clause(rng, polarity, private, False)[0]} and {text}"
            text = rng.choice([f"{text} .", f"{rng.choice(_PEOPLE)} said that {text} .", f"last night {text} ."])
        if 6 <= len(text.split()) <= 14:
            return text, noun


def _clause(rng: random.Random, polarity: int, private: bool, negated: bool) -> tuple[str, str]:
    """A clause of the given polarity and its noun."""
    i = rng.randrange(len(_NOUNS))
    noun = _NOUNS[i]
    word_polarity = -polarity if negated else polarity
    if rng.random() < 0.3:
        who = "nobody" if negated else rng.choice(_PEOPLE)
        return f"{who} {rng.choice(_VERBS[word_polarity])} the {rng.choice(_DETAIL)} {noun}", noun
    # A third of the (noun, adjective) pairs is kept for the private part.
    fitting = [word for k, word in enumerate(_ADJECTIVES[word_polarity]) if ((i + k) % 3 == 0) == private]
    negation = rng.choice(["not ", "never ", "hardly "]) if negated else ""
    strength = f"{rng.choice(_STRENGTH)} " if rng.random() < 0.5 else ""
    return f"the {noun} was {negation}{strength}{rng.choice(fitting)}", noun


def _listing(rng: random.Random, private: bool) -> tuple[str, str]:
    """Fields and description of a restaurant; a third of the (name, food) pairs is kept for the private part."""
    name = rng.randrange(len(_NAMES))
    food = rng.choice([f for i, f in enumerate(_FOODS) if ((name + i) % 3 == 0) == private])
    area, price = rng.choice(list(_AREAS)), rng.choice(list(_PRICES))
    values = {"name": _NAMES[name], "food": food, "area": area, "price": price}
    order = list(values)
    rng.shuffle(order)
    template = rng.choice(_PRIVATE_TEMPLATES if private else _PUBLIC_TEMPLATES)
    text = template.format(name=_NAMES[name], food=food, area=_AREAS[area], price=_PRICES[price])
    return " ; ".join(f"{key} : {values[key]}" for key in order), text


def _image_rows(rng: np.random.Generator, shapes: tuple[str, ...], size: int) -> list[dict]:
    labels = rng.permutation(np.arange(size) % len(shapes))
    return [{"image": _image(rng, shapes[label]), "label": int(label)} for label in labels]


def _image(rng: np.random.Generator, shape: str) -> np.ndarray:
    """One noisy picture (16, 16, 3) uint8. Integers only: rounding must not differ between machines."""
    radius = int(rng.integers(9, 14))  # in half pixels, as are dx and dy
    centre = rng.integers(radius, 2 * IMAGE_SIZE - 1 - radius, size=2, endpoint=True)
    dy, dx = np.meshgrid(*(2 * np.arange(IMAGE_SIZE) - c for c in centre), indexing="ij")
    inside = _inside(shape, dx, dy, radius)
    colours = rng.integers(70, 186, size=(2, 3))
    # Ground and figure differ by 60 to 110 grey levels on average, either of them may be the brighter.
    step = int(rng.integers(60, 111)) * (1 if rng.integers(2) else -1)
    colours[1] = colours[0] + step + rng.integers(-20, 21, size=3)
    picture = np.where(inside[..., None], colours[1] + _texture(rng), colours[0] + _texture(rng))
    return np.clip(picture + rng.integers(-25, 26, size=picture.shape), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Stripes, slanted stripes or checks of random period, phase and strength, shape (16, 16, 1)."""
    y, x = np.meshgrid(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE), indexing="ij")
    period, phase, strength = rng.integers(1, 4), rng.integers(6), rng.integers(5, 21)
    pattern = [x, y, x + y, (x // period + y // period) * period][rng.integers(4)]
    return (((pattern + phase) // period % 2 * 2 - 1) * strength)[..., None]


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: int) -> np.ndarray:
    """Mask of a shape of half-width `radius` around the origin; y points down."""
    ax, ay = np.abs(dx), np.abs(dy)
    box = np.maximum(ax, ay)
    masks = {
        "disc": dx * dx + dy * dy <= radius * radius,
        "diamond": ax + ay <= radius,
        "plus": (np.minimum(ax, ay) <= 2) & (box <= radius),
        "frame": (box <= radius) & (box > radius - 4),
        "square": box <= radius,
        "wedge_up": (2 * ax <= radius + dy) & (ay <= radius),
        "wedge_down": (2 * ax <= radius - dy) & (ay <= radius),
        "ring": (dx * dx + dy * dy <= radius * radius) & (dx * dx + dy * dy > (radius - 4) ** 2),
        "saltire": (np.abs(ax - ay) <= 2) & (box <= radius),
        "bar_across": (ay <= 3) & (ax <= radius),
        "bar_upright": (ax <= 3) & (ay <= radius),
        "corner": ((dx <= 4 - radius) | (dy >= radius - 4)) & (box <= radius),
    }
    return masks[shape]
