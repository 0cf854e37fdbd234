"""Readers of attributes, on models with random weights and a small CLIP that is trained here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPModel,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from invdiff_pl.metrics import correct_for_classifier
from invdiff_pl.metrics.clip import ClipEncoder
from invdiff_pl.metrics.network_readers import ClipReader, ImageClassifierReader, VqaReader
from invdiff_pl.metrics.readers import CheckedReader, ClassifierReader, FunctionReader
from invdiff_pl.utils.errors import InvDiffError

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WORDS += ["is", "it", "dark", "or", "bright", "very", "?"]


def pictures(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dark and bright noise, uint8 ``[N, 3, 32, 32]``, and which is bright."""
    source = torch.Generator().manual_seed(seed)
    bright = torch.randint(2, (count,), generator=source)
    noise = torch.rand(count, 3, 32, 32, generator=source)
    return ((noise + bright[:, None, None, None]) * 127).byte(), bright


def tokenizer(folder: Path) -> BertTokenizerFast:
    (folder / "words").mkdir(parents=True)
    file = folder / "words" / "vocab.txt"
    file.write_text("\n".join(WORDS))
    return BertTokenizerFast(str(file))


def test_clip_reads_the_phrase_of_the_largest_cosine(weights: Path) -> None:
    images, _ = pictures(5)
    phrases = {"water": "a mallard on water", "land": "a bird"}
    reader = ClipReader(str(weights / "clip"), phrases, name="place")
    encoder = ClipEncoder(str(weights / "clip"))
    tokens = encoder.tokenizer(list(phrases.values()), padding=True, return_tensors="pt")
    pixels = encoder.processor(images=list(images), return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(weights / "clip").eval()(**tokens, **pixels)
    assert torch.equal(reader(images), expected.logits_per_image.argmax(1))
    assert (reader.name, reader.classes) == ("place", ("water", "land"))
    one = {"water": phrases["water"], "land": "two birds"}
    assert ClipReader(str(weights / "clip"), one).identity != reader.identity


def test_a_trained_clip_tells_pictures_by_phrases_it_was_trained_with(
    weights: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = ClipEncoder(str(weights / "clip"))
    model = encoder.model.requires_grad_(True).train()
    phrases = ["a photo of a bird", "a photo"]
    tokens = encoder.tokenizer(phrases, padding=True, return_tensors="pt")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, bright = pictures(64)
    pixels = encoder.processor(images=list(images), return_tensors="pt")["pixel_values"]
    for _ in range(30):
        logits = model(**tokens, pixel_values=pixels).logits_per_image
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, bright).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    encoder.processor.save_pretrained(tmp_path)
    others, expected = pictures(40, seed=1)
    assert torch.equal(ClipReader(str(tmp_path), phrases)(others), expected)


def test_an_image_classifiers_labels_are_classes_or_add_up_to_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=64, image_size=32, patch_size=16)
    config.id2label = {0: "0-2", 1: "3-9", 2: "more than 70"}
    config.label2id = {label: number for number, label in config.id2label.items()}
    model = ViTForImageClassification(config).eval()
    model.classifier.weight.data *= 30
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images, _ = pictures(8)
    reader = ImageClassifierReader(str(tmp_path), name="age")
    pixels = reader.processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        shares = model(pixels).logits.softmax(1)
    assert torch.equal(reader(images), shares.argmax(1))
    assert reader.classes == ("0-2", "3-9", "more than 70")
    groups = {"young": ["0-2", "3-9"], "old": ["more than 70"]}
    merged = ImageClassifierReader(str(tmp_path), groups)
    torch.testing.assert_close(merged.scores(images)[:, 0], shares[:, :2].sum(1))
    with pytest.raises(InvDiffError, match="cannot tell 'ancient': its labels are 0-2, 3-9"):
        ImageClassifierReader(str(tmp_path), {"young": ["0-2"], "old": ["ancient"]})


def test_a_vqa_model_that_chooses_answers_reads_the_likeliest_of_those_given(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = ViltConfig(
        **SIZES, intermediate_size=64, image_size=32, patch_size=16, vocab_size=len(WORDS)
    )
    config.id2label = {0: "dark", 1: "bright", 2: "red"}
    config.label2id = {label: number for number, label in config.id2label.items()}
    ViltForQuestionAnswering(config).save_pretrained(tmp_path)
    processor = ViltProcessor(
        ViltImageProcessor(size={"shortest_edge": 32}), tokenizer(tmp_path / "t")
    )
    processor.save_pretrained(tmp_path)
    images, _ = pictures(6)
    reader = VqaReader(str(tmp_path), "is it dark or bright ?", ["bright", "dark"], "light")
    scores = reader.scores(images)
    logits = reader.network(**reader._inputs(list(images))).logits
    torch.testing.assert_close(scores, logits[:, [1, 0]])
    assert reader(images).shape == (6,)
    with pytest.raises(InvDiffError, match="cannot tell 'green'"):
        VqaReader(str(tmp_path), "is it green ?", ["green", "red"])


def test_a_vqa_model_that_writes_answers_reads_the_one_of_highest_likelihood(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    text = {**SIZES, "intermediate_size": 64, "vocab_size": len(WORDS), "encoder_hidden_size": 32}
    text |= {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    vision = {**SIZES, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=vision)
    BlipForQuestionAnswering(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer(tmp_path / "t")).save_pretrained(
        tmp_path
    )
    images, _ = pictures(2)
    reader = VqaReader(str(tmp_path), "is it dark or bright ?", ["dark", "very bright"])
    scores = reader.scores(images)
    inputs = reader._inputs([images[1]])
    answer = reader.processor.tokenizer("very bright", return_tensors="pt").input_ids
    network: Any = reader.network
    with torch.no_grad():
        seen = network.vision_model(pixel_values=inputs["pixel_values"])[0]
        asked = network.text_encoder(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=seen,
        )[0]
        logits = network.text_decoder(
            input_ids=answer,
            encoder_hidden_states=asked,
            encoder_attention_mask=inputs["attention_mask"],
        ).logits
    chances = logits[0, :-1].log_softmax(1).gather(1, answer[0, 1:, None])
    torch.testing.assert_close(scores[1, 1], chances.sum())


def test_errors_of_a_reader_are_taken_out_of_what_it_counts(classifier: Path) -> None:
    def dull(images: Tensor) -> Tensor:  # calls every fourth bright picture dark
        bright = images.float().mean((1, 2, 3)) > 110
        return (bright & (torch.arange(len(images)) % 4 > 0)).long()

    images, labels = pictures(64)
    order = labels.argsort()
    reader = CheckedReader(
        FunctionReader(dull, ["dark", "bright"], "light"), images[order], labels[order]
    )
    assert reader.confusion.sum(1).tolist() == labels.bincount().tolist()
    missed = float(reader.confusion[1, 0] / reader.confusion[1].sum())
    assert missed == pytest.approx(0.25, abs=0.05)
    told = torch.tensor([[50 + round(50 * missed), 50 - round(50 * missed)]])
    shares = correct_for_classifier(told, reader.confusion).shares
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5]]).double(), atol=0.01, rtol=0)
    with pytest.raises(InvDiffError, match="no picture of 'bright'"):
        CheckedReader(reader, images, torch.zeros(64, dtype=torch.long))
    with pytest.raises(InvDiffError, match="found 3 from"):
        CheckedReader(reader, images, labels[:3])
    known = ClassifierReader(classifier).confusion
    assert known is not None
    assert known.tolist() == [[45, 5], [5, 45]]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ClipReader(folder, ["a man", "a woman"]),
        ImageClassifierReader,
        lambda folder: VqaReader(folder, "is it?", ["yes", "no"]),
    ],
)
def test_a_folder_without_a_model_is_refused_in_one_line(make, tmp_path: Path) -> None:
    with pytest.raises(InvDiffError, match="cannot load") as caught:
        make(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_readers_refuse_fewer_than_two_classes(weights: Path) -> None:
    with pytest.raises(InvDiffError, match="two classes or more"):
        ClipReader(str(weights / "clip"), ["a man"], "gender")
