"""Windows are compared with the plain per-token definition and with the answers' characters."""
import copy
import pickle
from pathlib import Path

import datasets
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers

from qa.data.dataset import load_examples
from qa.data.tokenizer import QATokenizer
from qa.data.windows import FewQuestions, make_windows, windows_for_answers
from qa.settings import ModelSettings
from runtime.errors import UsageError
from tests.reference.windows import WITH_SPACES, plain_windows, tokenizer_of

FAMILIES = [("roberta", "right"), ("roberta", "left"), ("bert", "right"), ("bert", "left"),
            ("xlm-roberta", "right"), ("xlnet", "left")]
XQUAD = Path(__file__).resolve().parents[3] / "shared" / "data" / "xquad-en" / "validation.json"


def examples_of(rows):
    """A data set from rows of (question, context, (start, end) of the answer or None)."""
    return datasets.Dataset.from_list(
        [{
            "id": str(number), "question": question, "context": context, "answers": {
                "text": [context[slice(*span)]] if span else [],
                "answer_start": [span[0]] if span else []}}
         for number, (question, context, span) in enumerate(rows)], features=datasets.Features({
             "id": datasets.Value("string"), "question": datasets.Value("string"),
             "context": datasets.Value("string"), "answers": {
                 "text": datasets.Sequence(datasets.Value("string")),
                 "answer_start": datasets.Sequence(datasets.Value("int32"))}}))


def windows_of(examples, tokenizer, max_seq_length, doc_stride, **options):
    settings = ModelSettings(max_seq_length=max_seq_length, doc_stride=doc_stride, **options)
    return make_windows(examples, QATokenizer.of(tokenizer), settings, labels=True, offsets=True)


def assert_plain(examples, tokenizer, max_seq_length, doc_stride, with_spaces=False):
    """Check every window and label against the plain definition; returns how many labels cross.

    Labels cross where the plain definition's start is after its end. Ours are then the same two in
    order, and inside the context.
    """
    windows, crossed = windows_of(examples, tokenizer, max_seq_length, doc_stride), 0
    # Not of a long pair: the later parts of one have type 1 in spite of a template without it.
    pair_types = tokenizer("a", "b").get("token_type_ids", [])
    assert (windows.second_text is not None) == (1 in pair_types)
    plain = plain_windows(examples, tokenizer, max_seq_length, doc_stride, with_spaces)
    assert len(windows) == len(plain)
    for i, expected in enumerate(plain):
        assert windows.input_ids(i).tolist() == expected["input_ids"]
        assert windows.offsets(i).tolist() == expected["offsets"]
        for name in ("example", "cls_position", "context_start"):
            assert getattr(windows, name)[i] == expected[name], name
        if windows.second_text is not None:
            second, types = windows.second_text[i], expected["token_type_ids"]
            assert types == [0] * second + [1] * (len(types) - second)
        labels = expected["start_position"], expected["end_position"]
        if labels[0] > labels[1]:
            crossed += 1
            last = expected["context_start"] + len(expected["offsets"]) - 1
            labels = sorted(min(label, last) for label in labels)
        assert [windows.start_position[i], windows.end_position[i]] == list(labels)
    assert_same_in_memory(windows, examples, tokenizer, max_seq_length, doc_stride)
    return crossed


def assert_same_in_memory(windows, examples, tokenizer, max_seq_length, doc_stride):
    """Check that the same examples without a data set give the same windows, also when pickled."""
    settings = ModelSettings(max_seq_length=max_seq_length, doc_stride=doc_stride)
    few = windows_for_answers(
        settings, QATokenizer.of(tokenizer),
        FewQuestions({name: examples[name][:] for name in ("id", "question", "context")}))
    few = pickle.loads(pickle.dumps(few))
    for name in ("lengths", "example", "cls_position", "context_start"):
        assert getattr(few, name).tolist() == getattr(windows, name).tolist()
    for i in range(len(windows)):
        assert (few.input_ids(i).tolist() == windows.input_ids(i).tolist()
                and few.offsets(i).tolist() == windows.offsets(i).tolist())


def edge_cases():
    long = ("Ada flew to Oslo in 1921. " * 9 + "😀🛩 Zoë wrote 日本語 in the naïve café "
            + "and rested. " * 7 + "The end")
    spans = [(0, 3), (0, len(long)), (len(long) - 3, len(long)), (len(long) - 7, len(long)), None]
    # Across every border between windows lie some of these.
    spans += [(start, start + size)
              for start in range(0, len(long) - 12, 7) for size in (1, 4, 12)]
    emoji = long.index("😀")
    spans += [(emoji, emoji + 1), (emoji, emoji + 2), (emoji + 1, emoji + 7),
              (emoji - 5, emoji + 1)]
    questions = ("Where to?", "  \n\t What is it", "Why? " * 5, "😀?")
    rows = [(questions[number % 4], long, span) for number, span in enumerate(spans)]
    return rows + [("When?", "1921", (0, 4)), ("What?", "😀", (0, 1)), ("Is it?", " a  b ", (4, 5)),
                   ("Who?", "Ada", None), ("What?", "a <s> b </s> c <mask>", (6, 7))]


@pytest.mark.slow
@pytest.mark.parametrize("family, side", FAMILIES)
@pytest.mark.parametrize("max_seq_length, doc_stride", [(48, 16), (64, 0), (512, 128)])
def test_edge_cases_are_the_plain_definition(family, side, max_seq_length, doc_stride):
    assert_plain(examples_of(edge_cases()), tokenizer_of(family, side), max_seq_length, doc_stride,
                 family in WITH_SPACES)


def odd_tokenizers():
    """Tokenizers of transformers' formats that differ from those of the published models."""
    def sentencepiece(scheme):
        made = copy.deepcopy(tokenizer_of("xlm-roberta"))
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=scheme)])
        return made

    added = copy.deepcopy(tokenizer_of("roberta"))
    added.add_tokens([AddedToken("Oslo", lstrip=True, rstrip=True), "in 19", "naïve"])
    left = sentencepiece("always")
    left.padding_side = "left"
    left.add_tokens(["Oslo in"])
    return {"added tokens": added, "a space before the first word only": sentencepiece("first"),
            "no space before a word": sentencepiece("never"), "left, with an added token": left}


@pytest.mark.parametrize("kind", list(odd_tokenizers()))
def test_an_odd_tokenizer_gives_the_plain_definition_too(kind):
    assert_plain(examples_of(edge_cases()[::3]), odd_tokenizers()[kind], 64, 16)


def test_labels_that_cross_in_the_plain_definition():
    tokenizer = tokenizer_of("roberta")
    last_token, emoji = (examples_of([("When?", "It was in 1921", (13, 14))]),
                         examples_of([("What?", "a 😁 b", (2, 3))]))
    for examples in (last_token, emoji):
        assert assert_plain(examples, tokenizer, 48, 16) == 1
        windows = windows_of(examples, tokenizer, 48, 16)
        first, last = (windows.start_position[0] - windows.context_start[0],
                       windows.end_position[0] - windows.context_start[0])
        assert 0 <= first <= last < len(windows.offsets(0))


@pytest.mark.skipif(not XQUAD.exists(), reason="no xquad-en beside the repository")
@pytest.mark.parametrize("family, side", [("roberta", "right"), ("bert", "left")])
def test_xquad_is_the_plain_definition(tmp_path, family, side):
    examples = load_examples(split="validation", file=XQUAD, cache_dir=tmp_path)
    assert_plain(examples, tokenizer_of(family, side), 384, 128)


CHARACTERS = st.one_of(st.sampled_from("ab é日😀🛩\u0301 \n"),
                       st.characters(blacklist_categories=("Cs", )))
TEXT = st.text(CHARACTERS, min_size=1, max_size=60)


@st.composite
def answered(draw):
    """(question, context, (start, end) of the answer): any text, the answer anywhere in it."""
    question, context = draw(TEXT), draw(TEXT)
    start = draw(st.integers(0, len(context) - 1))
    return question, context, (start, draw(st.integers(start + 1, len(context))))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(answered(), min_size=1, max_size=12))
@pytest.mark.slow
def test_labels_give_back_the_answer(rows):
    """With byte-level BPE the labels mark the answer's characters, as far as whole tokens can.

    They mark exactly the answer if a token begins at its first character and one ends at its last.
    Otherwise they mark the fewest tokens that cover it: the answer and the rest of its first and
    last token. White space at either end of an answer may belong to no token.
    """
    windows = windows_of(examples_of(rows), tokenizer_of("roberta"), 512, 128)
    for i, (_, context, (start, end)) in enumerate(rows):
        offsets = windows.offsets(i)
        if windows.start_position[i] == windows.cls_position[i]:
            # The answer begins or ends with white space that is outside all tokens.
            assert offsets[0, 0] > start or offsets[-1, 1] < end
            continue
        first, last = (windows.start_position[i] - windows.context_start[i],
                       windows.end_position[i] - windows.context_start[i])
        begin, after = offsets[first, 0], offsets[last, 1]
        assert first <= last
        if start in offsets[:, 0] and end in offsets[:, 1]:
            assert context[begin:after] == context[start:end]
        assert begin == max(other for other in offsets[:, 0] if other <= start)
        assert after == min(other for other in offsets[:, 1] if other >= end)


def test_settings_and_questions_that_leave_no_room():
    tokenizer, examples = tokenizer_of("roberta"), examples_of(
        [("Who? " * 40, "Ada flew. " * 40, (0, 3)), ("Who?", "Ada", (0, 3))])
    for max_seq_length, doc_stride in ((48, 43), (4, 0), (48, -1)):
        with pytest.raises(UsageError, match="--doc_stride"):
            windows_of(examples, tokenizer, max_seq_length, doc_stride)
    with pytest.raises(UsageError, match="id '0'"):
        windows_of(examples, tokenizer, 48, 16)
    cut = windows_of(examples, tokenizer, 48, 16, on_bad_row="skip")
    assert cut.lengths.max() == 48 and numpy.unique(cut.example).tolist() == [0, 1]


@pytest.mark.slow
def test_longest_question_is_the_rust_tokenizers():
    """A question is refused as too long exactly when the Rust tokenizer fails on it.

    If the question has one token less, the tokenizer cuts the context.
    """
    tokenizer, words = tokenizer_of("roberta"), ["Ada flew. " * 40]
    for count in range(1, 48):
        question = "a" * 1 + " a" * (count - 1)
        examples = examples_of([(question, words[0], (0, 3))])
        try:
            plain_windows(examples, tokenizer, 48, 16)
        except BaseException:  # a panic of the Rust library is not an Exception
            with pytest.raises(UsageError):
                windows_of(examples, tokenizer, 48, 16)
        else:
            assert_plain(examples, tokenizer, 48, 16)


def test_cache_pickle_and_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join('{"id": "%d", "question": "Who?", "context": "Ada %d flew to Oslo", '
                              '"answers": {"text": ["Ada"], "answer_start": [0]}}' % (i, i)
                              for i in range(2500)))
    examples = load_examples(split="train", file=file, cache_dir=tmp_path)
    tokenizer = QATokenizer.of(tokenizer_of("roberta"))

    def make(doc_stride):
        return make_windows(examples, tokenizer, ModelSettings(
            max_seq_length=48, doc_stride=doc_stride), labels=True, offsets=False)

    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("windows-*/*")}

    windows, files = make(16), written()
    assert windows.fingerprint == make(16).fingerprint and files == written() != {}
    pickled = pickle.dumps(windows)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    assert copy.example.tolist() == list(range(2500)) and copy.fingerprint == windows.fingerprint
    tokens = copy.input_ids(2400)
    assert tokens.tolist() == windows.input_ids(2400).tolist()
    assert tokens.dtype == numpy.uint16 and not tokens.flags.owndata
    assert make(8).fingerprint != windows.fingerprint
