"""The plain definition of windows and labels, token by token, and small tokenizers to try it on."""
from functools import lru_cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizerFast, PreTrainedTokenizerFast, RobertaTokenizerFast

# Tokenizers whose tokens begin at the space before a word.
WITH_SPACES = ("xlm-roberta", "xlnet")


def plain_windows(examples, tokenizer, max_seq_length, doc_stride, with_spaces=False):
    """The windows of run_qa's prepare_train_features and prepare_validation_features.

    with_spaces: whether the tokenizer counts spaces to the tokens, of which they are stripped here.

    Returns a list of dictionaries, one for each window, without padding. start_position and
    end_position are as run_qa's two loops find them, counted from the first token that is not
    padding; the start may be after the end, and may have run past the context.
    """
    right = tokenizer.padding_side == "right"
    names = ("question", "context") if right else ("context", "question")
    columns = {
        "question": [question.lstrip() for question in examples["question"]],
        "context": list(examples["context"])}
    encoded = tokenizer(
        *(columns[name] for name in names), truncation="only_second" if right else "only_first",
        max_length=max_seq_length, stride=doc_stride, return_overflowing_tokens=True,
        return_offsets_mapping=True, padding="max_length")
    windows = []
    for i, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"])):
        example = encoded["overflow_to_sample_mapping"][i]
        cls = ids.index(tokenizer.cls_token_id)
        context = [
            k for k, text in enumerate(encoded.sequence_ids(i)) if text == (1 if right else 0)]
        answers = examples["answers"][example]
        if with_spaces:
            text = examples["context"][example]
            for k in context:
                begin, after = offsets[k]
                while begin < after and text[begin] == " ":
                    begin += 1
                while begin < after and text[after - 1] == " ":
                    after -= 1
                offsets[k] = (begin, after)
        start = end = cls
        if answers["text"]:
            first, after = answers["answer_start"][0], answers["answer_start"][0] + len(
                answers["text"][0])
            if offsets[context[0]][0] <= first and offsets[context[-1]][1] >= after:
                start, end = context[0], context[-1]
                while start < len(offsets) and offsets[start][0] <= first:
                    start += 1
                start -= 1
                while offsets[end][1] >= after:
                    end -= 1
                end += 1
        real = [k for k, mask in enumerate(encoded["attention_mask"][i]) if mask]
        windows.append({
            "input_ids": [ids[k] for k in real], "example": example, "cls_position": cls - real[0],
            "context_start": context[0] - real[0], "start_position": start - real[0],
            "end_position": end - real[0], "offsets": [list(offsets[k]) for k in context],
            "token_type_ids": [encoded["token_type_ids"][i][k] for k in real]
                              if "token_type_ids" in encoded else None})
    return windows


@lru_cache(maxsize=None)
def tokenizer_of(family, padding_side="right"):
    """Return a tokenizer of a model family for a few lines.

    The families are "roberta" (byte-level BPE), "bert" (WordPiece), "xlm-roberta" and "xlnet"
    (both Unigram).
    """
    text = ["The pilot Ada Quist flew from Oslo to Lisbon in 1921, and wrote a book about the sea.",
            "Where did Ada fly to? Who wrote it, when, and why? What is the name of the book?",
            "Zoë's naïve café — 36°C, “quoted”, a-b/c 3.14 😀 日本語 text, and another line."] * 4
    if family == "roberta":
        return RobertaTokenizerFast(tokenizer_object=_byte_level(text), padding_side=padding_side,
                                    trim_offsets=True)
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    if family == "bert":
        special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = (normalizers.BertNormalizer(),
                                                     pre_tokenizers.BertPreTokenizer())
        backend.train_from_iterator(
            text,
            trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        return BertTokenizerFast(tokenizer_object=backend, padding_side=padding_side)
    # Not by UnigramTrainer, whose vocabulary differs from process to process.
    words = [f"▁{word}" for line in text for word in line.split()]
    backend = Tokenizer(models.Unigram(
        [(token, 0.0) for token in special] + [(word, -1.0) for word in dict.fromkeys(words)] +
        [(character, -9.0) for character in dict.fromkeys("".join(words))], 0))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    pair = "<s> $A </s> </s> $B </s>" if family == "xlm-roberta" else "$A </s> $B </s> <s>"
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair,
                                                           special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side,
                                   unk_token="<unk>", pad_token="<pad>", cls_token="<s>",
                                   sep_token="</s>")


def _byte_level(text):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (pre_tokenizers.ByteLevel(add_prefix_space=False),
                                              decoders.ByteLevel())
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=400,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
                            show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0),
                                                          trim_offsets=True, add_prefix_space=False)
    return backend
