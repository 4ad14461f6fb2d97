"""The decoding loop against transformers' own `generate`, and its recorded steps, whose recording a GPU alone can do."""

import copy
import inspect
import pickle

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_prefix import TAILS, left_padded, split, talkative
from tiny import EOS, SEG, prompt, tiny_batch, tiny_read
from transformers import TextStreamer

from model import READForCausalLM, add_lora, decoding, llava, recording, sam

COUNTS = [1, 2, 3, 7]


def asked(count, model, tails=TAILS):
    """(encoded picture, arguments of the questions)."""
    views, questions = split(left_padded(tiny_batch([prompt(*t) for t in tails[:count]], [0] * count, sizes=((40, 56),))))
    return model.encode_images(**views), questions


def same(found, expected):
    """Ids, masks and logits of two generations."""
    assert found.answer_ids == expected.answer_ids
    for ours, theirs in zip(found.step_logits, expected.step_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for ours, theirs in zip(found.segments.mask_logits, expected.segments.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture
def replayed(monkeypatch):
    """Steps are recorded without a GPU: a recording takes steps of the model as it was. Gives one entry a recording."""
    made = []

    def record(function, device):
        known = inspect.getclosurevars(function).nonlocals
        was, rows = copy.deepcopy(known["llava"]), known["rows"]
        made.append(function)
        return lambda: decoding._advance(was, rows)

    monkeypatch.setattr(decoding, "recordable", lambda model: True)
    monkeypatch.setattr(decoding, "record", record)
    return made


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_answers_are_those_of_transformers(count):
    """The same ids and logits as `generate` of the library, from the same embeddings."""
    model = talkative()
    images, questions = asked(count, model)
    ours = model.generate_answers(images, **questions, max_new_tokens=9, output_logits=True, share_prefix=False)
    theirs = model.llava.generate(
        inputs_embeds=llava.embed_inputs(
            model.llava, questions["input_ids"], images.features, questions["image_of_question"]
        ),
        attention_mask=questions["attention_mask"].long(), max_new_tokens=9, do_sample=False,
        eos_token_id=EOS, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for answer, ids in zip(ours.answer_ids, theirs.sequences.tolist(), strict=True):
        assert answer == ids[: ids.index(EOS) + 1 if EOS in ids else None]
    for n, answer in enumerate(ours.answer_ids):
        for step in range(len(answer)):
            torch.testing.assert_close(ours.step_logits[step][n], theirs.logits[step][n], atol=1e-4, rtol=0)
    if count == 7:
        assert len({len(answer) for answer in ours.answer_ids}) > 2
        assert {SEG in answer for answer in ours.answer_ids} == {True, False}


@torch.no_grad()
def test_more_room_is_made_while_answers_grow(monkeypatch):
    """The same answers with room for two more tokens at a time."""
    model = talkative()
    model.llava.lm_head.weight[EOS] = 0  # nobody ends early
    images, questions = asked(3, model)
    expected = model.generate_answers(images, **questions, max_new_tokens=30, output_logits=True)
    assert all(len(answer) == 30 for answer in expected.answer_ids)
    monkeypatch.setattr(decoding, "PLACES", 2)
    same(model.generate_answers(images, **questions, max_new_tokens=30, output_logits=True), expected)


@pytest.mark.parametrize("places", [2, 64])
@torch.no_grad()
def test_recorded_steps_give_the_same(replayed, monkeypatch, places):
    """Each number of questions is recorded once, taken up again by other questions, beside fewer or more of them."""
    model = talkative()
    expected = {}
    for count in COUNTS:
        images, questions = asked(count, model)
        expected[count] = model.generate_answers(images, **questions, max_new_tokens=8, output_logits=True)
    assert not replayed
    monkeypatch.setattr(decoding, "PLACES", places)
    made = []
    with model.decoder.recorded():
        for count in (3, 7, 3, 1, 2, 7, 3):
            images, questions = asked(count, model)
            same(model.generate_answers(images, **questions, max_new_tokens=8, output_logits=True), expected[count])
            made.append(len(replayed))
        if places == 64:  # memory for four rows, then for eight, in which the smaller numbers find room too
            assert made == [1, 2, 3, 4, 5, 5, 5]
            assert model.decoder._keys[0].shape[0] == 8
    assert not model.decoder._keys and not model.decoder._recorded and not model.decoder.on


def another_weight(model):
    model.llava.lm_head.weight = torch.nn.Parameter(model.llava.lm_head.weight.flip(0))


def lora_off(model):
    for layer in lora_layers(model):
        layer.enable_adapters(False)


def lora_scaled(model):
    for layer in lora_layers(model):
        layer.set_scale("default", 3.0)


def lora_merged(model):
    for layer in lora_layers(model):
        layer.merge()


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("change", [another_weight, lora_off, lora_scaled, lora_merged, READForCausalLM.half])
@torch.no_grad()
def test_what_was_recorded_is_of_this_model(replayed, change):
    """Other weights, LoRA switched off, merged in place or scaled, another dtype: what was recorded before does not answer."""
    model = add_lora(talkative(), r=4, dropout=0.0)
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.eval()
    with model.decoder.recorded():
        for _ in range(2):
            images, questions = asked(2, model)
            model.generate_answers(images, **questions, max_new_tokens=6)
            assert len(replayed) == 1
        change(model)
        images, questions = asked(2, model)
        found = model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True)
        assert len(replayed) == 2
    same(found, model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True))


@torch.no_grad()
def test_recordings_serve_those_alone_who_ask_for_them(replayed):
    """Switched off, steps are those of the model as it is."""
    model = talkative()
    images, questions = asked(2, model)
    model.decoder.on = True
    model.generate_answers(images, **questions, max_new_tokens=6)
    model.decoder.on = False
    model.llava.lm_head.weight.copy_(model.llava.lm_head.weight.flip(0))
    found = model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True)
    assert not model.decoder._keys
    same(found, model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True))


@torch.no_grad()
def test_a_question_leaves_nothing_to_the_next(replayed):
    """What overflowed once would make everything NaN, even behind a mask."""
    model = talkative()
    images, questions = asked(2, model)
    expected = model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True)
    with model.decoder.recorded():
        model.generate_answers(images, **questions, max_new_tokens=6)
        for held in (*model.decoder._keys, *model.decoder._values):
            held.fill_(float("nan"))
        same(model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True), expected)


@torch.no_grad()
def test_a_copy_of_a_model_has_recordings_of_its_own(replayed):
    model = talkative()
    images, questions = asked(2, model)
    model.decoder.on = True
    expected = model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True)
    other = copy.deepcopy(model)
    assert other.decoder.on and not other.decoder._keys and model.decoder._keys
    same(other.generate_answers(images, **questions, max_new_tokens=6, output_logits=True), expected)
    again = pickle.loads(pickle.dumps(model.recorder))
    assert not again.on and not again._found


@torch.no_grad()
def test_transformers_own_streamer_tells_every_word():
    """With `skip_prompt` it leaves out what is put first: a prompt, which is empty here."""
    model = talkative()
    images, questions = asked(1, model)

    class Tokens:
        def decode(self, ids, **_):
            return " ".join(map(str, ids)) + " "

    class Told(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    told = Told(Tokens(), skip_prompt=True)
    out = model.generate_answers(images, **questions, max_new_tokens=6, streamer=told)
    assert [int(word) for word in told.text.split()] == out.answer_ids[0]


@torch.no_grad()
def test_where_recording_fails_steps_are_taken_as_they_are(monkeypatch):
    """Tried once, not at every step."""
    model = talkative()
    images, questions = asked(2, model)
    expected = model.generate_answers(images, **questions, max_new_tokens=8, output_logits=True)
    tried = []
    monkeypatch.setattr(decoding, "recordable", lambda model: True)
    monkeypatch.setattr(decoding, "record", lambda function, device: tried.append(function))
    with model.decoder.recorded():
        for _ in range(2):
            same(model.generate_answers(images, **questions, max_new_tokens=8, output_logits=True), expected)
    assert len(tried) == 1


@torch.no_grad()
def test_an_error_leaves_nothing_behind(replayed):
    model = talkative()
    images, questions = asked(2, model)

    class Stops:
        def put(self, ids):
            raise KeyboardInterrupt

    with model.decoder.recorded():
        model.generate_answers(images, **questions, max_new_tokens=4)
        assert model.decoder._keys
        with pytest.raises(KeyboardInterrupt):
            model.generate_answers(images, **questions, max_new_tokens=4, streamer=Stops())
        assert not model.decoder._keys and not model.decoder._recorded
        with pytest.raises(ValueError, match="max_new_tokens must be 1 or more"):
            model.generate_answers(images, **questions, max_new_tokens=0)


@torch.no_grad()
def test_without_recording_no_memory_is_kept():
    """On a CPU, recorded or not: there is nothing to record."""
    model = talkative()
    images, questions = asked(2, model)
    with model.decoder.recorded():
        model.generate_answers(images, **questions, max_new_tokens=4)
        assert not model.decoder._keys


@torch.no_grad()
def test_an_attention_without_masks_is_replaced_while_decoding():
    model = talkative()
    images, questions = asked(3, model)
    expected = model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True)
    config = model.llava.model.language_model.config
    config._attn_implementation = "flash_attention_2"
    same(model.generate_answers(images, **questions, max_new_tokens=6, output_logits=True), expected)
    assert config._attn_implementation == "flash_attention_2"


@torch.no_grad()
def test_what_comes_back_is_recorded_at_the_second_call(monkeypatch):
    """`Recorder`: as the function, for each shape; nothing is left behind the block."""
    made = []

    def record(function, device, pool):
        made.append(function)
        function()  # its tensors exist from now on, as those of a graph do
        return lambda: None

    monkeypatch.setattr(recording, "recordable", lambda module: True)
    monkeypatch.setattr(recording, "record", record)
    linear, recorder = torch.nn.Linear(3, 2), recording.Recorder()
    one, two = torch.randn(1, 3), torch.randn(2, 3)
    assert torch.equal(recorder("a", linear, linear, one), linear(one)) and not made
    with recorder.recorded():
        for expected in (0, 1, 1):
            assert torch.equal(recorder("a", linear, linear, one), linear(one))
            assert len(made) == expected
        recorder("a", linear, linear, two)
        recorder("b", linear, linear, one)
        assert len(made) == 1
        with torch.enable_grad():
            assert recorder("a", linear, linear, one).requires_grad
        # Begun in inference mode, gone on with outside.
        with torch.inference_mode():
            given = torch.randn(5, 3)
            for _ in range(2):
                recorder("a", linear, linear, given)
        recorder("a", linear, linear, torch.randn(5, 3))
    assert not recorder._found and not recorder.on


@torch.no_grad()
def test_a_recording_that_breaks_off_is_forgotten(monkeypatch):
    """Of its memory too: another recording must not go on in the middle of it."""

    def record(function, device, pool):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recording, "recordable", lambda module: True)
    monkeypatch.setattr(recording, "record", record)
    linear, recorder = torch.nn.Linear(3, 2), recording.Recorder(on=True)
    recorder._pool = (0, 1)
    recorder("a", linear, linear, torch.randn(1, 3))
    with pytest.raises(torch.OutOfMemoryError):
        recorder("a", linear, linear, torch.randn(1, 3))
    assert recorder._pool is None
    recorder.forget()
    assert not recorder._found


def test_what_recordings_read_stays_where_it_is():
    """After pictures of many sizes, the constants of SAM's prompt encoder are the tensors that they were."""
    model = tiny_read()
    device = torch.device("cpu")
    before = sam._square((64, 64), device)
    for height in range(40, 240):
        sam.to_sam_frame(torch.rand(1, 1, 2), (48, 64), (height, 64))
        sam._square((height, 64), device)
    assert sam._square(tuple(model.sam.prompt_encoder.input_image_size), device) is before
