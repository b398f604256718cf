"""Prompts written for this project, of the kinds that the shipped pair was trained on.

They cover service chats, short Python functions, grade-school mathematics, explanations and
everyday writing. With them an evaluation needs no data files; published figures need public
questions.
"""

from __future__ import annotations

# (category, turns)
OWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("dialogue", ("I'd like to book a table for four people on Friday evening.",)),
    (
        "dialogue",
        (
            "I need a one-way train ticket to Porto for next Tuesday.",
            "The one before noon, please. Is there a quiet coach on it?",
        ),
    ),
    ("dialogue", ("Can I get a large cappuccino with oat milk, and a blueberry muffin?",)),
    ("dialogue", ("My parcel was meant to come yesterday and the tracking page shows nothing.",)),
    (
        "dialogue",
        (
            "I'm looking for a dentist in the north of the town who is open on Saturdays.",
            "That sounds fine. Please make an appointment for half past ten.",
        ),
    ),
    ("dialogue", ("Which films are on tonight, and what does a ticket for a student cost?",)),
    ("code", ("Write a Python function that returns the second largest number of a list.",)),
    ("code", ("Write a Python function that counts how often each word occurs in a text.",)),
    (
        "code",
        (
            "Write a Python function that checks whether a string reads the same backwards.",
            "Now make it ignore spaces, punctuation and upper case.",
        ),
    ),
    ("code", ("What is the difference between a list and a tuple in Python?",)),
    (
        "code",
        (
            "Complete the following function.\n\n```python\ndef running_mean(values, width):\n"
            '    """Mean of each `width` neighbouring values.\n\n'
            '    >>> running_mean([1, 2, 3, 4], 2)\n    [1.5, 2.5, 3.5]\n    """\n```',
        ),
    ),
    ("code", ("Write a Python class for a queue with the methods push, pop and is_empty.",)),
    (
        "math",
        ("A baker sells 14 rolls in the morning and twice as many after noon. How many in all?",),
    ),
    (
        "math",
        (
            "Nadia saves 6 dollars a week. She has 15 dollars and wants a kite for 63 dollars. "
            "How many weeks must she save?",
            "And how many if her aunt gives her 12 dollars at the start?",
        ),
    ),
    ("math", ("Solve 3x + 5 = 26 for x and show the steps.",)),
    ("math", ("A rectangle is 9 cm long and 4 cm wide. What are its area and its perimeter?",)),
    (
        "math",
        ("A bus leaves with 32 people. At each of 3 stops 5 get off and 2 get on. How many stay?",),
    ),
    ("math", ("What is 15 percent of 240?",)),
    ("explain", ("Explain in two sentences why the sky looks red at sunset.",)),
    (
        "explain",
        (
            "How does a refrigerator keep food cold?",
            "Explain it again so that a child of six understands it.",
        ),
    ),
    ("explain", ("What is the difference between a virus and a bacterium?",)),
    ("explain", ("Why does bread dough rise before it goes into the oven?",)),
    ("writing", ("Write a short thank-you note to a neighbour who watered my plants.",)),
    ("writing", ("Give me three ideas for a rainy afternoon with two small children.",)),
)
