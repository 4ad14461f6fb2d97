"""What the mini world says about its eight kinds of things: names, and questions that need a step to get to them.

In `ASKS`, `{c}` becomes a colour with a space behind it, or nothing. No question of a kind fits another kind: footwear is told
apart by weather and use, tops by warmth and sleeves.
"""

NAMES = {
    "t-shirt": ("t-shirt", "tee"),
    "trousers": ("trousers", "pants"),
    "pullover": ("pullover", "sweater"),
    "dress": ("dress", "gown"),
    "sandal": ("sandal",),
    "sneaker": ("sneaker", "trainer"),
    "bag": ("bag", "purse"),
    "boot": ("boot", "ankle boot"),
}

SINGULAR = {"trousers": "pair of trousers"}
"""Names that take no article, and what one of them is called."""

COLOURS = {
    "red": (206, 40, 44),
    "green": (44, 150, 62),
    "blue": (46, 92, 214),
    "yellow": (240, 208, 40),
    "purple": (142, 64, 188),
    "orange": (242, 126, 24),
    "pink": (248, 150, 190),
    "white": (246, 246, 246),
}
"""RGB."""

ASKS = {
    "t-shirt": (
        "It is hot and I want short sleeves: which {c}thing should I put on?",
        "What {c}thing would you wear on top for a jog in July?",
        "Which {c}garment leaves the forearms bare and ends at the waist?",
        "On a hot day, what {c}item would cover your chest but not your elbows?",
        "Which {c}thing often has a band's name printed on the front?",
        "What {c}piece of clothing is pulled over the head and has short sleeves?",
        "A waiter at a beach bar needs a light top: which {c}item suits him?",
        "Which {c}thing would you pair with shorts in summer?",
    ),
    "trousers": (
        "Which {c}thing would you put your legs into?",
        "What {c}item needs a belt to stay up?",
        "The knees get cold: which {c}thing would cover them and has two legs?",
        "Which {c}garment has two long tubes of cloth?",
        "What {c}thing would you wear below a jacket at the office, one leg at a time?",
        "Which {c}piece of clothing is measured by waist and inseam?",
        "What {c}item would protect both shins in tall grass?",
        "Which {c}thing here is put on over the feet and buttoned at the waist?",
    ),
    "pullover": (
        "The evening is cold: which {c}thing would keep your arms and chest warm?",
        "What {c}item is often knitted from wool by grandmothers?",
        "Which {c}garment has long sleeves and is pulled over the head in winter?",
        "What {c}thing would you put on when the heating fails?",
        "Which {c}piece of clothing would you wear over a thin top in autumn?",
        "What {c}item covers the arms down to the wrists?",
        "By the camp fire I begin to shiver: which {c}thing should I slip on?",
        "Which {c}thing is warm, soft, and has long sleeves?",
    ),
    "dress": (
        "What {c}thing could a woman wear to a ball?",
        "Which {c}garment hangs in one piece from the shoulders to the knees?",
        "What {c}item would a bridesmaid put on?",
        "Which {c}thing swings when its wearer dances?",
        "She needs no skirt and no blouse, only one piece: which {c}item is it?",
        "What {c}piece of clothing would suit a singer on a stage at a gala?",
        "Which {c}thing combines a top and a skirt?",
        "What {c}item would she choose for a summer wedding?",
    ),
    "sandal": (
        "What {c}thing would you put on your feet for a day at the beach?",
        "Which {c}footwear lets the toes breathe?",
        "The sand is hot: what {c}item has straps and an open toe?",
        "Which {c}thing would a Roman have worn on the foot?",
        "What {c}item protects the soles but leaves the toes bare?",
        "By the pool, which {c}thing belongs on the feet?",
        "Which {c}thing is held on the foot by straps only?",
        "What {c}footwear would you pick for the hottest week of August?",
    ),
    "sneaker": (
        "What {c}thing would you lace up for a run in the park?",
        "Which {c}footwear belongs on a tennis court?",
        "What {c}item would a basketball player wear on the foot?",
        "Which {c}thing helps you sprint to catch the bus?",
        "For the gym, what {c}thing goes on the feet?",
        "Which {c}item has a springy sole made for sport?",
        "What {c}footwear would a jogger wear out first?",
        "Which {c}thing would you need for a marathon?",
    ),
    "bag": (
        "Which {c}thing carries your books?",
        "Where would you put your keys, your phone and a wallet: which {c}item?",
        "What {c}thing hangs from the shoulder and holds other things?",
        "Which {c}item would you take along to bring the groceries home?",
        "What {c}thing here is not worn but carried by a handle?",
        "Which {c}thing could hide a lipstick, a comb and an umbrella?",
        "A thief in a crowd would reach for which {c}thing?",
        "What {c}item can be filled and closed with a zip?",
    ),
    "boot": (
        "What {c}thing keeps your ankles dry when you walk through snow?",
        "Which {c}footwear reaches above the ankle?",
        "It rains and the path is muddy: what {c}thing should you put on your feet?",
        "Which {c}item would a hiker wear in the mountains in winter?",
        "What {c}thing would a cowboy put on his feet?",
        "Which {c}footwear would you wear to build a snowman?",
        "Puddles everywhere: which {c}thing keeps water off the ankles?",
        "What {c}item has a shaft, a heel and is made of leather for bad weather?",
    ),
}
"""Full sentences, by the kind that answers them."""

HINTS = {
    "t-shirt": ("the {c}thing with short sleeves", "the {c}top for a hot day", "the {c}garment that leaves forearms bare",
                "the {c}thing to wear with shorts"),
    "trousers": ("the {c}thing for both legs", "the {c}garment held by a belt", "the {c}thing that covers knees and shins",
                 "the {c}clothing with two long tubes"),
    "pullover": ("the {c}thing with long warm sleeves", "the {c}top for a cold evening", "the {c}knitted garment",
                 "the {c}thing that warms arms and chest"),
    "dress": ("the {c}thing for a ball", "the {c}garment in one piece down to the knees", "the {c}outfit of a bridesmaid",
              "the {c}thing that is top and skirt at once"),
    "sandal": ("the {c}footwear for the beach", "the {c}thing that leaves toes bare", "the {c}footwear made of straps",
               "the {c}thing to wear by the pool"),
    "sneaker": ("the {c}footwear for sport", "the {c}thing to run in", "the {c}footwear for a tennis match",
                "the {c}thing a jogger laces up"),
    "bag": ("the {c}thing for carrying books", "the {c}thing with a handle", "the {c}place for keys and a wallet",
            "the {c}thing that holds other things"),
    "boot": ("the {c}footwear for snow", "the {c}thing that covers the ankle", "the {c}footwear for mud and rain",
             "the {c}thing to wear in the mountains in winter"),
}  # fmt: skip
"""Short phrases, by the kind they mean."""

ABSENT_ANSWERS = (
    "Nothing in this picture is fit for that: there is no {name}.",
    "That would take a {name}, and there is none here.",
    "I see no {name} here, so nothing answers that.",
    "There is no {name} in the picture to do this with.",
    "For that one would need a {name}; this picture has none.",
)

SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
EXTREMES = {
    "left": ("leftmost {}", "{} furthest to the left"),
    "right": ("rightmost {}", "{} furthest to the right"),
    "top": ("topmost {}", "{} at the top"),
    "bottom": ("lowest {}", "{} at the bottom"),
}

CAPTION_QUESTIONS = ("What do you see in this picture?", "Describe the picture.", "Which things are here, and where?")

COUNT_WORDS = ("none", "one", "two", "three", "four", "five")
