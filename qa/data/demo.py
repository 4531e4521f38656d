"""Generate the demo: a data set of invented biographies and a small untrained model.

The biographies come from a seeded generator. The model is a 4-layer RoBERTa with random weights,
and its byte-level BPE tokenizer is trained on the biographies. Everything is written as ordinary
files that the ordinary flags read, and no network is needed.

The task can be learned from scratch in two minutes because each context is about one person, its
facts come from closed lists, and the words around a fact tell what it is. (A context may contain
two cities and two years: only the sentence around each says which one a question asks for.)
Contexts about several people would require entity matching, which a model of this size does not
learn in that time.
"""
from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import Formatter

import yaml

from runtime import processes
from runtime.errors import RunError
from runtime.files import system_error

TRAIN_QUESTIONS, VALIDATION_QUESTIONS, QUESTIONS_PER_CONTEXT, TOPICS_PER_CONTEXT = 8000, 500, 4, 4
MEAN_TOKENS = 62  # per window, special tokens included
# The model's sizes, named as in its config.json.
MODEL = {
    "vocab_size": 2000,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    # Near 1 / sqrt(hidden_size). With BERT's 0.02, attention in a model this narrow stays uniform
    # for hundreds of steps.
    "initializer_range": 0.08,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0}


def use_demo_data(settings):
    """Write the demo below settings.output_dir, if it is asked for, and return the settings for it.

    The returned copy of `settings` names the demo's files like any other data and model. Raises
    RunError if they cannot be written.
    """
    if not settings.demo_data:
        return settings
    folder = Path(settings.output_dir) / "demo_data"
    try:
        processes.on_first(partial(
            write_demo, folder, seed=settings.seed,
            version_2_with_negative=settings.version_2_with_negative))
    # tokenizers and safetensors raise their own kinds of errors for a failed write.
    except Exception as error:
        reason = system_error(error)
        if reason is None:
            raise
        raise RunError(
            f"{folder}: the demo's files cannot be written ({reason}); make room there or name "
            "another --output_dir") from error
    return replace(settings, train_file=str(folder / "train.json"),
                   validation_file=str(folder / "validation.json"),
                   model_name_or_path=str(folder / "model"), dataset_name=None)


def write_demo(folder, *, seed, version_2_with_negative=False):
    """Write the demo's data set and model into `folder`, which is created if necessary.

    train.json and validation.json have SQuAD's nested layout: 8,000 and 500 questions, four to a
    context, and no context in both files. model/ holds the tokenizer, the configuration and the
    random weights. With `version_2_with_negative` a third of the questions ask for a fact that
    their context does not mention. The same `seed` gives the same data and weights; the global
    random state of torch is left unchanged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = yaml.safe_load(Path(__file__).with_name("demo.yaml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    seen = set()
    for name, questions in (("train", TRAIN_QUESTIONS), ("validation", VALIDATION_QUESTIONS)):
        paragraphs = []
        while len(paragraphs) * QUESTIONS_PER_CONTEXT < questions:
            paragraph = _paragraph(rng, texts, version_2_with_negative)
            if paragraph["context"] not in seen:
                seen.add(paragraph["context"])
                paragraphs.append(paragraph)
        for number, qa in enumerate(qa for paragraph in paragraphs for qa in paragraph["qas"]):
            qa["id"] = f"{name}-{number:04d}"
        data = {"version": "v2.0" if version_2_with_negative else "1.1",
                "data": [{"title": "Invented biographies", "paragraphs": paragraphs}]}
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
        if name == "train":
            _write_model(folder / "model", paragraphs, seed)


def _paragraph(rng, texts, version_2_with_negative):
    """Return one person's context and its questions, in SQuAD's layout but without ids."""
    person, facts = _person(rng, texts), texts["facts"]
    topics = rng.sample(sorted(texts["topics"]), TOPICS_PER_CONTEXT)
    sentences = [texts["opening"], *(texts["topics"][topic] for topic in topics)]
    context, starts = _fill([rng.choice(wordings) for wordings in sentences], person, facts)
    absent = sorted(set(facts) - set(starts))
    qas = []
    for fact in rng.sample(sorted(starts), QUESTIONS_PER_CONTEXT):
        impossible = version_2_with_negative and rng.random() < 1 / 3
        if impossible:
            fact = absent.pop(rng.randrange(len(absent)))
        qa = {
            "question": rng.choice(texts["questions"][fact]).format(**person),
            "answers": [] if impossible else [{"text": person[fact], "answer_start": starts[fact]}]}
        if version_2_with_negative:
            qa["is_impossible"] = impossible
        qas.append(qa)
    return {"context": context, "qas": qas}


def _person(rng, texts):
    """Return a random value for every slot of the sentences and questions, by the slot's name."""
    woman = rng.random() < 0.5
    person = {fact: rng.choice(values) for fact, values in texts["facts"].items()}
    person["home"] = rng.choice([city for city in texts["facts"]["home"]
                                 if city != person["birthplace"]])
    first_names = texts["women" if woman else "men"]
    person["name"] = f"{rng.choice(first_names)} {rng.choice(texts['surnames'])}"
    pronouns = {"she": "she", "her": "her", "her_object": "her"} if woman else {
        "she": "he", "her": "his", "her_object": "him"}
    person.update(pronouns, She=pronouns["she"].capitalize(), Her=pronouns["her"].capitalize())
    return person


def _fill(sentences, person, facts):
    """Join the sentences and fill their slots.

    Returns (text, {fact: index of the character at which its value starts}).
    """
    text, starts = "", {}
    for literal, slot, _, _ in Formatter().parse(" ".join(sentences)):
        text += literal
        if slot in facts:
            starts[slot] = len(text)
        if slot:
            text += person[slot]
    return text, starts


def _write_model(folder, paragraphs, seed):
    """Train a byte-level BPE tokenizer on `paragraphs`; write it and a RoBERTa with random weights.

    seed: of the weights.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForQuestionAnswering, RobertaTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    texts = [
        text for paragraph in paragraphs
        for text in [paragraph["context"]] + [qa["question"] for qa in paragraph["qas"]]]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=MODEL["vocab_size"], min_frequency=2,
                            show_progress=False,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    folder.mkdir(exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                     model_max_length=512)
    tokenizer.save_pretrained(str(folder))
    config = RobertaConfig(**MODEL, pad_token_id=tokenizer.pad_token_id,
                           bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        disable_progress_bar()  # of four files
        RobertaForQuestionAnswering(config).save_pretrained(str(folder), safe_serialization=True)
