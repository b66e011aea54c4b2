"""LongEval and needle cases: their form, what is right, where the needle lies, what is refused.

The published files are not read here; what is compared with them are hashes of their prompts without ids and numbers.
"""

import copy
import hashlib
import json
import re

import pytest
from transformers import AutoTokenizer

from cskv_hf.demo import MODEL_PATH
from cskv_hf.demo.corpus import reference_topics
from cskv_hf.evaluate import longeval
from cskv_hf.evaluate.answers import encode_prompt
from cskv_hf.evaluate.cases import Case
from cskv_hf.evaluate.longeval import line_cases, line_entries, load_lines, load_topics, topic_cases, topic_entries
from cskv_hf.evaluate.needle import (
    LINE_NEEDLE,
    RULER,
    NeedleTemplate,
    contained_references,
    line_haystack,
    needle_cases,
)

PUBLISHED_LINES = "fab20ad1c482f4728c4df34308316a5809be284a5456b18950bddab2d059155f"
PUBLISHED_TOPICS = "3cf16a2b947df872e984d1bdf89986d1f759696709f8bf1c93c92fb0ce2d14e8"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def text():
    return "".join(reference_topics(held_out=True))


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def topics_file(path):
    """Two cases over three topics, in the published form."""
    entries = []
    for test_id, topics in enumerate((["The future of space", "The role of art"], ["The role of art", "Sleep"])):
        body = "".join(f"{longeval.TOPIC_START}{t}. \n ASSISTANT: Sure. \n USER: The next topic." for t in topics)
        prompt = longeval.TOPICS_INTRO.format(count=2) + body + longeval.TOPICS_QUESTION
        entries.append({"test_id": test_id, "prompt": prompt, "topics": topics, "prompt_length": -1})
    return write(path, entries)


# LongEval


def test_lines_have_the_published_form():
    """Up to ids and numbers, which are random, a prompt of 200 lines is each of the 50 published ones."""
    for entry in line_entries(200, 3):
        plain = re.sub(r"line [^\n?]*?(: REG|\? I)", r"line KEY\1", entry["prompt"])
        assert digest(re.sub(r"<\d+>", "<N>", plain)) == PUBLISHED_LINES


@pytest.mark.parametrize("num_lines", [1, 7, 1000])
def test_lines(num_lines):
    entries = line_entries(num_lines, 20)
    for entry, case in zip(entries, line_cases(entries), strict=True):
        keys, values = zip(*re.findall(r"^line (.*): REGISTER_CONTENT is <(\d+)>$", entry["prompt"], re.MULTILINE))
        assert len(set(keys)) == num_lines and all(re.fullmatch("[a-z]+-[a-z]+", key) for key in keys)
        assert all(1 <= int(value) <= 50_000 for value in values)
        key, position = entry["random_idx"]
        assert (keys[position], int(values[position])) == (key, entry["expected_number"])
        assert entry["prompt"].count(entry["correct_line"]) == 1 and f"in line {key}? I need" in entry["prompt"]
        assert case.group == f"{num_lines} lines" and case.prompt == entry["prompt"]
        assert case.references == (values[position],) and case.metric(entry["correct_line"], case) == 1.0
    assert len({entry["random_idx"][1] for entry in entries}) > 1 or num_lines == 1


def test_generators_are_deterministic(tmp_path, tokenizer, text):
    path = topics_file(tmp_path / "2_topics.jsonl")
    makers = (
        lambda seed: line_entries(50, 5, seed),
        lambda seed: topic_entries(path, 3, 5, seed),
        lambda seed: needle_cases(tokenizer, text, [512], [0.5], 3, seed, progress=False),
        lambda seed: line_haystack([50], [0.5], 3, seed),
    )
    for make in makers:
        assert make(1) == make(1) != make(2)
    both = needle_cases(tokenizer, text, [400, 512], [0.0, 0.5], 3, 1, progress=False)
    assert makers[2](1) == both[-3:]  # a cell is the same whatever others there are


def test_topics(tmp_path):
    """Conversations of a published file, each whole, in the order of the topics; loaded and made ones alike."""
    path = topics_file(tmp_path / "2_topics.jsonl")
    loaded = load_topics(path)
    assert [case.group for case in loaded] == ["2 topics"] * 2
    assert [case.references for case in loaded] == [("The future of space",), ("The role of art",)]
    entries = topic_entries(path, 3, 20)
    for entry, case in zip(entries, topic_cases(entries), strict=True):
        named = re.findall(r"USER: I would like to discuss the topic of (.*?)\. \n ASSISTANT: Sure", case.prompt)
        assert named == entry["topics"] and sorted(named) == ["Sleep", "The future of space", "The role of art"]
        frame = case.prompt[: case.prompt.index("USER: I would")] + case.prompt[case.prompt.rindex(" Now the rec") :]
        assert digest(frame.replace("on 3 different", "on 5 different")) == PUBLISHED_TOPICS
        assert case.metric(named[0], case) == 1.0 and case.metric(named[1], case) == 0.0
    assert len({entry["topics"][0] for entry in entries}) == 3
    made = topic_entries(path, 2, 50)
    assert json.loads(path.read_text().split("\n")[0])["prompt"] in {entry["prompt"] for entry in made}


def test_files_round_trip(tmp_path):
    entries = line_entries(20, 4)
    assert load_lines(write(tmp_path / "lines.jsonl", entries)) == line_cases(entries)


@pytest.mark.parametrize(
    "answer, score",
    [
        ("2416", 1.0),
        ("The <REGISTER_CONTENT> in line torpid-kid is <2416>.", 1.0),
        ("It is 2416.\nAnother line is 17.", 0.0),  # the whole answer counts
        ("I see 17.\nThe number is 02416", 1.0),
        ("24160", 0.0),
        ("none", 0.0),
    ],
)
def test_last_number(answer, score):
    case = Case("0", "", "", ("2416",), longeval.last_number, 8)
    assert case.metric(answer, case) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        ("the role of art in society", 1.0),
        ('The first topic we discussed was "The Role of Art in Society".', 1.0),
        ("role of art in society; the future of the role of art", 1.0),
        ("The role of art", 0.0),  # another topic, and part of the first
        ("Sleep, and the role of art in society", 0.0),
        ("Sleepy talk of the role of art in society", 1.0),
        ("", 0.0),
    ],
)
def test_first_topic(answer, score):
    topics = ["The role of art in society", "The role of art", "Sleep"]
    case = Case("0", "", "", (topics[0],), longeval.first_topic, 8, details={"topics": topics})
    assert case.metric(answer, case) == score


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": None}, r"Line 2 of '.*lines.jsonl': the field `prompt` must be a non-empty str, got null"),
        ({"expected_number": "7"}, r"Line 2 of .*: the field `expected_number` must be a non-empty int, got \"7\""),
        ({"expected_number": 0}, "Line 2 of .*: `expected_number` is not the number on `correct_line`"),
        ({"correct_line": "line a-b: REGISTER_CONTENT is <7>\n"}, "Line 2 of .*: `correct_line` does not occur"),
    ],
)
def test_wrong_line_files(tmp_path, changes, message):
    first, second = line_entries(5, 2)
    with pytest.raises(ValueError, match=message):
        load_lines(write(tmp_path / "lines.jsonl", [first, second | changes]))


def test_other_errors(tmp_path, tokenizer, text):
    path = topics_file(tmp_path / "2_topics.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(path.read_text().split("\n")[0] + "\n{")
    uncut = write(tmp_path / "uncut.jsonl", [{"test_id": 0, "prompt": "USER: hello", "topics": ["a"]}])
    endless = NeedleTemplate("{key} {value}", "{key}?", draw=lambda rng: ("the", "of"))

    def needles(*arguments, **settings):
        return lambda: needle_cases(tokenizer, *arguments, **{"progress": False} | settings)

    for call, error, message in (
        (lambda: load_lines(tmp_path / "no.jsonl"), FileNotFoundError, "no file of LongEval test cases '.*no.jsonl'"),
        (lambda: load_topics(broken), ValueError, "Line 2 of '.*broken.jsonl' is not JSON"),
        (lambda: load_topics(write(tmp_path / "t", [{"test_id": 0, "topics": []}])), ValueError, "Line 1 .* `topics`"),
        (lambda: topic_entries(uncut, 1), ValueError, "Line 1 of .* it has the former 0 times"),
        (lambda: topic_entries(path, 4), ValueError, "between 1 and the 3 topics of '.*', got 4"),
        (lambda: topic_entries(path, 2, 0), ValueError, "`count` must be at least 1, got 0"),
        (lambda: line_entries(10, 0), ValueError, "`count` must be at least 1, got 0"),
        (lambda: line_entries(10**6), ValueError, f"between 1 and {longeval.MAX_KEYS}, got 1000000"),
        (lambda: line_haystack([50], [-0.1]), ValueError, r"`depths` must be between 0 and 1, got \[-0.1\]"),
        (lambda: line_haystack([50], needles_per_cell=0), ValueError, "`needles_per_cell` must be at least 1, got 0"),
        (lambda: line_haystack([901]), ValueError, "between 1 and 900, got 901"),
        (needles(text, [512], [1.5]), ValueError, r"`depths` must be between 0 and 1, got \[1.5\]"),
        (needles(text, [512], needles_per_cell=0), ValueError, "`needles_per_cell` must be at least 1, got 0"),
        (needles(__file__, [2048]), ValueError, "is a string, so a text, and names a file; give it as a"),
        (needles(text[:2000], [2048]), ValueError, "tokens, too few for the length 2048 in `lengths`"),
        (needles(text, [150]), ValueError, "`lengths` holds 150, but .* an answer of 128 tokens already take"),
        (needles(tmp_path / "no.txt", [512]), FileNotFoundError, "no.txt"),
        (needles(text, [512], template=endless), ValueError, "holds every key or value that 1000 draws"),
    ):
        with pytest.raises(error, match=message):
            call()


# Needles


@pytest.mark.parametrize("template", [RULER, LINE_NEEDLE], ids=["ruler", "lines"])
def test_needle_lies_where_it_should(tokenizer, text, template):
    """Prompt and answer fill the length, and the needle has its depth, both within one sentence; what is not needle,
    question or introduction is a stretch of the text."""
    lengths, depths = (400, 1024), (0.0, 0.3, 0.5, 1.0)
    cases = needle_cases(tokenizer, text, lengths, depths, 4, template=template, progress=False)
    assert [case.group for case in cases[:16:4]] == [f"400 tokens, depth {d} %" for d in (0, 30, 50, 100)]
    assert [case.group for case in cases[16::16]] == ["1,024 tokens, depth 0 %"]
    doubled = 2 * (text.strip() + "\n")

    def size(text):
        return len(tokenizer(text)["input_ids"])

    longest = max(size(sentence) for sentence in re.split(f"(?<=\n)|{template.cut}", text))
    for case in cases:
        names = {"key": case.details["key"], "value": case.references[0]}
        needle = template.needle.format(**names)
        end = template.question.format(**names)
        assert case.answer_prefix == template.answer_prefix.format(**names)
        assert case.prompt.startswith(template.intro) and case.prompt.endswith(end)
        assert case.prompt.count(needle) == 1 == case.prompt.count(names["value"])
        assert names["key"] in template.question.format(**names)
        before, behind = case.prompt[len(template.intro) : -len(end)].split(needle)
        assert before + behind in doubled
        assert before == "" or re.search(f"({template.cut})$", before)
        used = size(case.prompt + case.answer_prefix) + case.max_new_tokens
        assert case.details["length"] - longest - 2 <= used <= case.details["length"]
        total = size(before) + size(behind)
        assert abs(size(before) - case.details["depth"] * total) <= longest
        assert (before == "") is (case.details["depth"] == 0) and (behind == "") is (case.details["depth"] == 1)
    assert len({case.prompt for case in cases}) == len(cases)


def test_needle_length_counts_the_chat_template(tokenizer, text, tmp_path):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}" + 40 * "chat " + "{{ m.content }}{% endfor %}"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    plain, inside = (needle_cases(t, tmp_path / "text", [600], [0.5], 2, progress=False) for t in (tokenizer, chatty))
    assert plain == needle_cases(tokenizer, text, [600], [0.5], 2, progress=False)
    for case, other in zip(inside, plain):
        assert 600 - 100 <= len(encode_prompt(chatty, case)) + 128 <= 600 < len(encode_prompt(chatty, other)) + 128


def test_line_haystack():
    cases = line_haystack([10, 101], [0, 0.25, 1], 5)
    assert len(cases) == 2 * 3 * 5 and cases[0].group == "10 lines, depth 0 %"
    positions = {(case.details["num_lines"], case.details["depth"]): case.details["position"] for case in cases}
    assert positions == {(10, 0): 0, (10, 0.25): 2, (10, 1): 9, (101, 0): 0, (101, 0.25): 25, (101, 1): 100}
    for case in cases:
        *lines, question, rest = case.prompt.split("\n")
        assert len(lines) == case.details["num_lines"] and rest == ""
        key, value = re.fullmatch(
            r"line (\d\d-\d{3}): REGISTER_CONTENT is <(\d{5})>", lines[case.details["position"]]
        ).groups()
        assert question == f"what is the content in line {key}?" and case.references == (value,)
        assert case.prompt.count(f"line {key}:") == 1 and case.metric(
            f"line {key}: REGISTER_CONTENT is <{value}>", case
        )


def test_contained_references():
    case = Case("0", "", "", ("1234567", "Blue-Bird"), contained_references, 8)
    for answer, score in ((" 1234567 and blue-bird.", 1.0), ("1234567", 0.5), ("123456 7", 0.0), ("BLUE-BIRD", 0.5)):
        assert contained_references(answer, case) == score
