"""Our BERT beside transformers': the same files give the same states and ids, in both modes and on the real weights."""
from __future__ import annotations

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HERE = Path(__file__).resolve().parent.parent / "examples" / "text_classification"
sys.path.insert(0, str(HERE))

import bert  # noqa: E402
import prepare  # noqa: E402
import token_batches  # noqa: E402


def states(folder: Path, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ours and transformers' last states, of the tokens alone."""
    ours = bert.load_bert(folder)(ms.Tensor(ids), ms.Tensor(mask)).asnumpy()
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    return ours[mask > 0], theirs[mask > 0]


@pytest.mark.parametrize("headed", [False, True])
def test_a_folder_that_transformers_wrote(tmp_path, mode, headed):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
                                     intermediate_size=40, max_position_embeddings=30, initializer_range=0.3)
    kind = transformers.BertForSequenceClassification if headed else transformers.BertModel
    kind(config).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (5, 12)).astype(np.int32)
    mask = (np.arange(12)[None] < rng.integers(1, 13, (5, 1))).astype(np.float32)
    ours, theirs = states(tmp_path, ids, mask)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_all_minilm_itself(graph_mode):
    folder = prepare.CACHE / "base"
    if not (folder / bert.WEIGHTS).is_file():
        pytest.skip(f"{folder} is empty: run examples/text_classification/prepare.py")
    texts = ["A film that never ends.", "Naïve, but WONDERFUL?!", "我喜欢这部电影", "good " * 60]
    encoded = token_batches.encode(token_batches.load_tokenizer(folder), texts, 48)
    theirs = transformers.BertTokenizerFast(tokenizer_file=str(folder / bert.TOKENIZER))(
        texts, truncation=True, max_length=48, padding="max_length", return_tensors="np")
    mask = theirs["attention_mask"].astype(np.float32)
    assert np.array_equal(encoded.ids * (mask > 0), theirs["input_ids"] * (mask > 0))
    assert np.array_equal(encoded.counts, mask.sum(1))
    ours, expected = states(folder, *encoded.batch(np.arange(len(texts)), 48))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
