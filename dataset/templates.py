"""Questions and answers for training, in the numbers and roles of the original's pools (protocol §2), and the fixed ones of §5.

Slots: `{class_name}` the thing asked for, `{gt_name}` what is there instead, `{sent}` a whole sentence. Every SHORT and LONG
answer holds exactly one `[SEG]` and ends with it and a full stop; denials and corrections hold none. The pools are products of
a few openings and endings, so that no sentence stands twice and all stay our own.
"""

from itertools import product

EVAL_SHORT_QUESTION = "What is {class_name} in this image? Please output segmentation mask."
EVAL_LONG_QUESTION = "{sent} Please output segmentation mask."
EVAL_ANSWER = "Sure, the segmentation result is [SEG]."
"""Protocol constants (§5): evaluation has no randomness unless it is asked for."""

SHORT_QUESTION = tuple(
    f"{check} {then}"
    for check, then in product(
        (
            "Is there {class_name} in this image?",
            "Can you see {class_name} here?",
            "Does this picture show {class_name}?",
            "Please look for {class_name} in the image.",
            "Check whether {class_name} can be found in this photo.",
            "I am looking for {class_name}.",
            "Tell me if {class_name} is in the picture.",
            "Would you find {class_name} for me?",
            "Does {class_name} appear anywhere in this image?",
            "Do you spot {class_name} in this scene?",
        ),
        (
            "If so, segment it; if not, tell me what is there instead.",
            "If it is there, give me its mask, otherwise say that it is not.",
            "When you find it, outline it; when you do not, deny it.",
            "Mark its region if it exists, or else suggest what comes closest.",
            "In case it is present, return a segmentation mask; in case it is absent, say so.",
            "Segment it if you can, and let me know if it is missing.",
            "Show where it is with a mask, or correct me if I am wrong.",
            "If yes, please segment it. If no, what do you see that is similar?",
            "Should it exist, output its mask; should it not, name the nearest thing.",
            "A mask is wanted if it is there; a short denial if it is not.",
        ),
    )
)

LONG_QUESTION = tuple(
    f"{{sent}} {wish} {proof}"
    for wish, proof in product(
        (
            "Please answer with a segmentation mask.",
            "Give the mask of what you mean.",
            "Segment the answer in the image.",
            "Show it by a mask.",
            "Mark it in the picture.",
            "Return the region as a mask.",
            "Point it out with a segmentation.",
            "Outline it for me.",
        ),
        (
            "If nothing fits, say so.",
            "Otherwise tell me that it is not there.",
            "Deny it if the picture does not show it.",
            "If there is no such thing, explain.",
            "If I assume something wrong, correct me.",
            "If it cannot be found, tell me what is there.",
        ),
    )
)

SHORT_ANSWER = (
    *(
        f"{opening} {where} [SEG]."
        for opening, where in product(
            (
                "Yes, {class_name} is here:",
                "I found {class_name};",
                "Sure, {class_name} is in the image,",
                "{class_name} can be seen,",
                "There is {class_name},",
                "Certainly, this is {class_name}:",
                "The picture does show {class_name},",
                "Here you have {class_name},",
                "Indeed, {class_name} is present,",
                "Of course, I see {class_name},",
            ),
            ("its mask is", "the mask of it is", "it is", "the segmentation is", "its region is"),
        )
    ),
    *(
        f"{opening} {where} [SEG]."
        for opening, where in product(
            ("Sure,", "Yes,", "Certainly,", "Of course,", "It is there,", "I found it,"),
            ("it is", "the mask is", "the segmentation result is", "its region is", "the answer is"),
        )
    ),
)

LONG_ANSWER = tuple(
    f"{opening} {where} [SEG]."
    for opening, where in product(
        (
            "Sure,",
            "Thinking about it,",
            "That would be this:",
            "From what I see,",
            "The picture tells:",
            "Following your question,",
            "To answer you,",
        ),
        ("it is", "the mask is", "the region is", "the segmentation is", "what you mean is"),
    )
)

NEG_ANSWER = (
    *(
        f"{opening} {rest}"
        for opening, rest in product(
            (
                "There is no {class_name}",
                "I cannot find {class_name}",
                "I see no {class_name}",
                "No {class_name} can be seen",
            ),
            (
                "in this image.",
                "here.",
                "in the picture.",
                "in this photo.",
                "anywhere in this image.",
                "in the scene.",
                "in what you show me.",
                "among the things in this image.",
                "in the given image.",
                "in front of me.",
                "at all.",
                "in the shot.",
                "within this picture.",
                "in view.",
                "in this scene, I am afraid.",
                "in this image, sorry.",
                "on any spot of the picture.",
                "however closely I look.",
                "in the whole photo.",
            ),
        )
    ),
    "What you describe is not in this image.",
)

CORRECT_ANSWER = tuple(
    f"{denial} {instead}"
    for denial, instead in product(
        (
            "There is no {class_name} here,",
            "I cannot find {class_name},",
            "This image does not show {class_name},",
            "No {class_name} is to be seen,",
            "{class_name} is not in this picture,",
            "I see nothing like {class_name},",
            "Sorry, {class_name} is absent,",
            "The picture holds no {class_name},",
            "You will not find {class_name} here,",
        ),
        (
            "but there is {gt_name}.",
            "but I see {gt_name}.",
            "though {gt_name} is there.",
            "but {gt_name} can be found.",
            "only {gt_name}.",
            "perhaps you mean {gt_name}.",
            "did you mean {gt_name}?",
            "yet it does show {gt_name}.",
            "what comes closest is {gt_name}.",
            "instead there is {gt_name}.",
            "maybe you are thinking of {gt_name}.",
        ),
    )
)
