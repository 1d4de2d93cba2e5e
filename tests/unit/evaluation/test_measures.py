"""Diversity, retrieval, reconstruction, results."""

import json
import math

import pytest
import torch
from PIL import Image

from dalle_torch.evaluation.diversity import diversity
from dalle_torch.evaluation.protocol import PROTOCOL, environment, read_result, write_result
from dalle_torch.evaluation.reconstruction import ReconstructionStatistics
from dalle_torch.evaluation.retrieval import retrieval_accuracy


def test_diversity_is_the_mean_distance_of_pairs_then_of_prompts():
    corner = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])  # pairs 5, 0, 5
    same = torch.ones(2, 2)
    assert diversity([corner, same, torch.zeros(1, 2)]) == pytest.approx(10 / 3 / 2)
    with pytest.raises(ValueError, match="at least two pictures of a prompt"):
        diversity([torch.zeros(1, 2)])


class Reader:
    """Scores 1 where the picture's red value is the prompt's number, less otherwise."""

    def __init__(self, confused=()):
        self.confused, self.groups = confused, []

    def similarities(self, images, prompts):
        assert len(set(prompts)) == len(prompts)
        self.groups.append(len(prompts))
        red = torch.tensor([[float(image.getpixel((0, 0))[0])] for image in images])
        table = -(red - torch.tensor([[float(prompt) for prompt in prompts]])).abs()
        table[[row for row, value in enumerate(red[:, 0].tolist()) if value in self.confused]] = 0.0
        return table


def pictures(numbers):
    return [Image.new("RGB", (2, 2), (number, 0, 0)) for number in numbers], [str(number) for number in numbers]


@pytest.mark.parametrize("candidates", [2, 5, 32])
def test_retrieval_is_the_share_that_finds_its_own_prompt(candidates):
    images, prompts = pictures([*range(40), 3, 3, 7])
    reader = Reader()
    assert retrieval_accuracy(reader, images, prompts, candidates=candidates) == 1.0
    assert max(reader.groups) <= candidates
    # One that likes all prompts alike finds none.
    assert retrieval_accuracy(Reader(confused={5.0, 9.0}), images, prompts, candidates=candidates) == pytest.approx(
        1 - 2 / 43,
        abs=2e-3,  # a last group of one is left out
    )


def test_retrieval_needs_something_to_choose_from():
    images, prompts = pictures([1, 1])
    with pytest.raises(ValueError, match="two different prompts"):
        retrieval_accuracy(Reader(), images, prompts)
    with pytest.raises(ValueError, match="candidates=1"):
        retrieval_accuracy(Reader(), *pictures([1, 2]), candidates=1)


def noisy(level, seed=0):
    generator = torch.Generator().manual_seed(seed)
    originals = torch.randint(60, 200, (5, 3, 32, 32), generator=generator)
    noise = torch.randint(-level, level + 1, originals.shape, generator=generator) if level else 0
    return originals.to(torch.uint8), (originals + noise).to(torch.uint8)


def test_reconstruction_is_what_torchmetrics_says_whatever_the_batches():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    originals, reconstructions = noisy(20)
    codes = torch.tensor([[0, 1], [1, 2], [1, 1], [0, 0], [2, 2]])
    whole, parts = ReconstructionStatistics(8), ReconstructionStatistics(8)
    whole.update(originals, reconstructions, codes)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        parts.update(originals[rows], reconstructions[rows], codes[rows])
    result = whole.result()
    assert result == parts.result() and result["pictures"] == 5
    pairs = list(zip(reconstructions.double()[:, None], originals.double()[:, None], strict=True))
    mean = lambda values: float(sum(values) / len(pairs))  # noqa: E731
    assert result["psnr"] == pytest.approx(mean([peak_signal_noise_ratio(a, b, data_range=255.0) for a, b in pairs]))
    assert result["ssim"] == pytest.approx(
        mean([structural_similarity_index_measure(a, b, data_range=255.0) for a, b in pairs])
    )
    assert result["mse"] == pytest.approx(float(((originals.double() - reconstructions.double()) ** 2).mean()))
    shares = [0.3, 0.4, 0.3]
    assert result["codebook_used"] == 3 / 8
    assert result["codebook_perplexity"] == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))


def test_equal_pictures_have_no_error_and_a_finite_ratio():
    originals, _ = noisy(0)
    found = ReconstructionStatistics(4)
    found.update(originals, originals, torch.zeros(5, 1, dtype=torch.int64))
    result = found.result()
    assert result["mse"] == 0 and result["ssim"] == pytest.approx(1) and 80 < result["psnr"] < 120
    assert result["codebook_perplexity"] == pytest.approx(1)


def test_reconstructions_that_do_not_fit_are_refused():
    originals, _ = noisy(0)
    with pytest.raises(ValueError, match="uint8"):
        ReconstructionStatistics(4).update(originals, originals[:2], torch.zeros(5, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="no pictures were reconstructed"):
        ReconstructionStatistics(4).result()


def test_a_result_comes_back_with_every_digit(tmp_path):
    write_result(tmp_path / "r.json", {"fid": 0.1 + 0.2, "environment": environment(), "caption": "ä \ud800"})
    found = read_result(tmp_path / "r.json")
    assert found["fid"] == 0.1 + 0.2 and found["protocol"] == PROTOCOL
    assert found["environment"]["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__


def test_what_is_no_result_is_refused(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write_result(path, {"fid": float("nan")})
    assert not path.exists()
    for text in ("[]", "{", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no result of dalle-torch"):
            read_result(path)
    path.write_text(json.dumps({"protocol": "older"}))
    with pytest.raises(ValueError, match="protocol 'older'"):
        read_result(path)
