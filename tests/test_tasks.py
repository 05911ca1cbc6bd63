"""Losses, heads, predictions and metrics of the four tasks, beside other implementations and hand-worked cases."""

import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.multiprocessing.reductions import StorageWeakRef

from sketchfusion import ConfigError, Features, Geometry, SketchFusionError
from sketchfusion.data import DataSet, Record
from sketchfusion.images import collate, letterbox
from sketchfusion.tasks import Sample, retrieval
from sketchfusion.tasks.correspondence import Correspondence, match, pck
from sketchfusion.tasks.recognition import Recognition, accuracy, fit_linear
from sketchfusion.tasks.retrieval import Retrieval, info_nce, rank_metrics, search, triplet_loss
from sketchfusion.tasks.segmentation import (
    THRESHOLD,
    Segmentation,
    mask_iou,
    on_canvas,
    pixel_accuracy,
    predict,
    similarity,
)


def ranked_as(order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One query, and a gallery whose cosine with it falls in this order."""
    angles = torch.zeros(len(order))
    for place, row in enumerate(order):
        angles[row] = 0.1 + place * 1.4 / len(order)
    return torch.tensor([[1.0, 0.0]]), torch.stack([angles.cos(), angles.sin()], 1)


class TestRetrievalMetrics:
    def test_hand_worked(self) -> None:
        queries, gallery = ranked_as([0, 1, 2, 3, 4])
        found = rank_metrics(queries, gallery, ["a"], ["a", "b", "a", "b", "a"])
        assert found["map_all"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
        assert found["p_100"] == found["p_200"] == pytest.approx(3 / 5)
        assert (found["acc_1"], found["acc_5"], found["queries"], found["gallery"]) == (1, 1, 1, 5)

    def test_conventions_differ_where_the_literature_does(self) -> None:
        order = list(range(400))
        queries, gallery = ranked_as(order)
        ids = ["a" if i < 50 or i >= 300 else "b" for i in order]  # 150 relevant, 50 of them among the first 200
        ours, theirs = (rank_metrics(queries, gallery, ["a"], ids, convention=c) for c in ("zse", "sem-pcyc"))
        assert ours["map_200"] == pytest.approx(50 / 150)
        assert theirs["map_200"] == pytest.approx(1.0)
        assert ours["p_200"] == theirs["p_200"] == pytest.approx(50 / 200)
        assert ours["map_all"] == theirs["map_all"]

    def test_a_gallery_below_k(self) -> None:
        queries, gallery = ranked_as([0, 1, 2, 3])
        ids = ["a", "a", "b", "b"]
        assert rank_metrics(queries, gallery, ["a"], ids)["p_100"] == pytest.approx(2 / 4)
        assert rank_metrics(queries, gallery, ["a"], ids, convention="sem-pcyc")["p_100"] == pytest.approx(2 / 100)

    def test_sake_averages_over_classes(self) -> None:
        queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        gallery = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
        found = rank_metrics(queries, gallery, ["a", "a", "a", "a2"], ["a", "a2"], convention="sake")
        assert found["map_all"] == pytest.approx(1.0)
        queries[0] = torch.tensor([0.0, 1.0])  # AP 1/2
        per_class = rank_metrics(queries, gallery, ["a", "a", "a", "a2"], ["a", "a2"], convention="sake")
        over_queries = rank_metrics(queries, gallery, ["a", "a", "a", "a2"], ["a", "a2"])
        assert per_class["map_all"] == pytest.approx(((0.5 + 1 + 1) / 3 + 1) / 2)
        assert over_queries["map_all"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)

    def test_nothing_relevant_counts_as_zero(self) -> None:
        queries, gallery = ranked_as([0, 1])
        for convention in ("zse", "sake", "sem-pcyc"):
            found = rank_metrics(queries, gallery, ["c"], ["a", "b"], convention=convention)
            assert all(found[name] == 0 for name in ("map_all", "map_200", "p_100", "acc_1", "acc_5"))

    @pytest.mark.parametrize("seed", range(4))
    def test_agrees_with_scikit_learn_where_nothing_ties(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        queries, gallery = torch.randn(30, 8, generator=random), torch.randn(170, 8, generator=random)
        of_queries, of_gallery = (torch.randint(5, (n,), generator=random) for n in (30, 170))
        found = rank_metrics(queries, gallery, list(map(str, of_queries)), list(map(str, of_gallery)))
        cosines = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2).numpy()
        relevant = (of_queries[:, None] == of_gallery[None]).numpy()
        expected = np.mean([average_precision_score(r, c) for r, c in zip(relevant, cosines, strict=True)])
        assert found["map_all"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("convention", ["zse", "sake", "sem-pcyc"])
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_a_plain_loop_where_much_ties(self, seed: int, convention: str) -> None:
        random = np.random.default_rng(seed)
        queries = torch.eye(4)[torch.from_numpy(random.integers(4, size=12))]
        gallery = torch.eye(4)[torch.from_numpy(random.integers(4, size=260))]
        of_queries, of_gallery = random.integers(6, size=12), random.integers(5, size=260)
        found = rank_metrics(
            queries,
            gallery,
            list(map(str, of_queries)),
            list(map(str, of_gallery)),
            convention=convention,
            block_bytes=1,
        )
        rows: dict[int, list[list[float]]] = {}
        for query, wanted in zip(queries, of_queries, strict=True):
            order = sorted(range(260), key=lambda i: (-float(gallery[i] @ query), i))  # ties keep the gallery's order
            hits = [bool(of_gallery[i] == wanted) for i in order]
            row = []
            for k in (260, 200):
                precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(k) if hits[i]]
                count = sum(hits[:k]) if convention == "sem-pcyc" else min(k, sum(hits))
                row.append(sum(precisions) / count if count else 0.0)
            row += [sum(hits[:200]) / 200, sum(hits[:100]) / 100, float(hits[0]), float(any(hits[:5]))]
            rows.setdefault(int(wanted), []).append(row)
        means = [np.mean(group, axis=0) for group in rows.values()]
        every = [row for group in rows.values() for row in group]
        expected = np.mean(means if convention == "sake" else every, axis=0)
        names = ("map_all", "map_200", "p_200", "p_100", "acc_1", "acc_5")
        assert [found[name] for name in names] == pytest.approx(expected.tolist(), abs=1e-6)

    def test_blocks_change_nothing(self) -> None:
        random = torch.Generator().manual_seed(0)
        queries, gallery = torch.randn(50, 4, generator=random), torch.randn(60, 4, generator=random)
        ids = [str(i % 7) for i in range(60)]
        whole, pieces = (rank_metrics(queries, gallery, ids[:50], ids, block_bytes=b) for b in (2**28, 5000))
        assert whole == pieces
        assert torch.equal(search(queries, gallery, 5)[1], search(queries, gallery, 5, block_bytes=5000)[1])

    def test_errors(self) -> None:
        one = torch.ones(1, 2)
        with pytest.raises(ConfigError, match="zse, sake, sem-pcyc"):
            rank_metrics(one, one, ["a"], ["a"], convention="trec")
        with pytest.raises(SketchFusionError, match="count above 0"):
            rank_metrics(one, torch.ones(0, 2), ["a"], [])
        with pytest.raises(SketchFusionError, match="not finite"):
            search(one, torch.tensor([[float("nan"), 1.0]]), 1)
        with pytest.raises(SketchFusionError, match="2 ids for 1 queries"):
            rank_metrics(one, one, ["a", "b"], ["a"])
        with pytest.raises(SketchFusionError, match="2 wide and the gallery is 3"):
            search(one, torch.ones(1, 3), 1)

    def test_search(self) -> None:
        scores, rows = search(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]), 9)
        assert rows.tolist() == [[1, 2, 0]]  # equal cosines: the first of the gallery first
        assert scores.tolist() == [[1, 1, 0]]

    def test_search_takes_features(self) -> None:
        place = Geometry(8, 8, 0, 0, 8, 8, 8)
        places = collate([place] * 3)
        gallery = Features(np.float32([[1, 0], [0, 3], [0, 1]]), None, places, model="one")
        one = Features(torch.tensor([0.0, 2.0]), None, place, model="one")
        assert search(one, gallery, 2)[1].tolist() == [[1, 2]]
        assert search(one, torch.eye(2), 1)[1].tolist() == [[1]]
        assert search(np.float32([0, 2]), gallery.pooled, 2)[1].tolist() == [[1, 2]]
        assert search(Features(one.pooled, None, place), gallery, 2)[1].tolist() == [[1, 2]]  # of no known model
        with pytest.raises(SketchFusionError, match="of the models two and one"):
            search(Features(one.pooled, None, place, model="two"), gallery, 1)
        with pytest.raises(SketchFusionError, match="gallery have no pooled vectors"):
            search(one, Features(None, torch.zeros(3, 2, 1, 1), places), 1)

    def test_search_keeps_no_block_of_similarities(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or memory would be that of all queries times the whole gallery."""
        storages: list[StorageWeakRef] = []
        alive: list[int] = []

        def watched(*arguments: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for block in ranked(*arguments):
                alive.append(sum(not storage.expired() for storage in storages))
                storages.extend(StorageWeakRef(part.untyped_storage()) for part in block)
                yield block
                del block

        ranked = retrieval._ranked
        monkeypatch.setattr(retrieval, "_ranked", watched)
        scores, rows = search(torch.eye(6), torch.eye(6), 2, block_bytes=1)
        assert scores.shape == rows.shape == (6, 2)
        assert alive == [0] * 6

    @pytest.mark.skipif(sys.platform != "linux", reason="the peak is told in KiB on Linux only")
    def test_memory_is_that_of_a_block(self) -> None:
        """The similarities of all these pairs, ranked, would take 1.2 GiB."""
        script = """
            import resource, torch
            from sketchfusion.tasks.retrieval import rank_metrics, search
            def peak():
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            queries, gallery = torch.randn(400, 8), torch.randn(100_000, 8)
            ids = [str(i % 100) for i in range(100_000)]
            rank_metrics(queries[:1], gallery[:10], ids[:1], ids[:10])
            before = peak()
            rank_metrics(queries, gallery, ids[:400], ids)
            print(peak() - before)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
        )
        assert float(done.stdout) < 0.7


class TestRetrievalLosses:
    relevant = torch.eye(3, dtype=torch.bool)

    def test_triplet_by_hand(self) -> None:
        queries = torch.tensor([[1.0, 0.0]])
        gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        relevant = torch.tensor([[True, False, False]])
        # Positive at distance 0, hardest negative at 1 - 0.6 = 0.4.
        assert triplet_loss(queries, gallery, relevant, 0.3).item() == pytest.approx(0)
        assert triplet_loss(queries, gallery, relevant, 0.5).item() == pytest.approx(0.1)

    def test_info_nce_by_hand(self) -> None:
        same = torch.eye(3)
        right = -math.log(math.exp(2) / (math.exp(2) + 2))
        assert info_nce(same, same, self.relevant, 0.5).item() == pytest.approx(right)

    def test_what_has_nothing_to_find_is_left_out(self) -> None:
        same = torch.eye(3)
        relevant = self.relevant.clone()
        relevant[2] = False
        assert info_nce(same, same, relevant, 0.5).item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 2)))

    @pytest.mark.parametrize("loss", ["info_nce", "triplet"])
    def test_training_on_it_brings_a_pair_together(self, loss: str) -> None:
        task = Retrieval(drawn_set(), loss=loss, classes=2, per_class=2)
        records = task.batch(np.random.default_rng(0))
        pooled = torch.randn(len(records), 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        geometry = collate([letterbox(8, 8, 8)] * len(records))
        optimizer = torch.optim.SGD([pooled], lr=5.0)
        costs = []
        for _ in range(30):
            cost, parts = task.loss(Features(pooled, None, geometry), [Sample(r, {}, None) for r in records])
            assert parts == {loss: pytest.approx(cost.item())}
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            costs.append(cost.item())
        assert costs[-1] < 0.3 * costs[0]


def drawn_set(points: tuple[tuple[str, float, float], ...] = ()) -> DataSet:
    """Three classes of three photos with two sketches each; the last class has no sketches."""
    records = []
    for label in "abc":
        for i in range(3):
            records.append(Record(f"{label}{i}.jpg", "photo", label, photo=f"{label}/{i}", points=points))
            if label != "c":
                records += [
                    Record(f"{label}{i}-{k}.png", "sketch", label, photo=f"{label}/{i}", points=points) for k in (1, 2)
                ]
    return DataSet("drawn", ("a", "b", "c"), tuple(records), "all")


class TestRetrievalBatches:
    @pytest.mark.parametrize("level", ["category", "fine"])
    def test_what_has_no_class_or_photo_is_left_out(self, level: str) -> None:
        bare = [Record("p.jpg", "photo", None), Record("s.png", "sketch", None)]
        nameless = [Record("a9.jpg", "photo", "a"), Record("a9-1.png", "sketch", "a")]
        data = drawn_set()
        task = Retrieval(DataSet("drawn", data.classes, (*data.records, *bare, *nameless), "all"), level=level)
        assert not set(task.records) & set(bare)
        assert (nameless[1] in task.records) == (level == "category")

    def test_category(self) -> None:
        task = Retrieval(drawn_set(), classes=5, per_class=2)
        batch = task.batch(np.random.default_rng(0))
        assert sorted({r.label for r in batch}) == ["a", "b"]
        assert len([r for r in batch if r.kind == "sketch"]) == len([r for r in batch if r.kind == "photo"]) == 4
        assert {r.label for r in task.records} == {"a", "b"}

    def test_fine_grained_holds_hard_negatives_of_the_same_class(self) -> None:
        task = Retrieval(drawn_set(), level="fine", classes=2, per_class=3)
        for seed in range(5):
            batch = task.batch(np.random.default_rng(seed))
            sketches, photos = batch[: len(batch) // 2], batch[len(batch) // 2 :]
            assert [s.photo for s in sketches] == [p.photo for p in photos]
            assert len({p.photo for p in photos}) == len(photos) == 6

    def test_photos_that_nobody_drew_are_no_records_of_the_fine_level(self) -> None:
        data = drawn_set()
        bare = [Record(f"more{i}.jpg", "photo", "a", photo=f"a/more{i}") for i in range(5)]
        task = Retrieval(DataSet("drawn", data.classes, (*data.records, *bare), "all"), level="fine")
        seen = {record for seed in range(40) for record in task.batch(np.random.default_rng(seed))}
        assert seen == set(task.records)

    def test_the_same_seed_gives_the_same_batch(self) -> None:
        task = Retrieval(drawn_set())
        first, again, other = (task.batch(np.random.default_rng(s)) for s in (1, 1, 2))
        assert first == again != other

    def test_nothing_to_train_on(self) -> None:
        photos = DataSet("set", ("a",), drawn_set().photos, "photos only")
        with pytest.raises(SketchFusionError, match="0 classes with both sketches and photos"):
            Retrieval(photos)
        # Where all is relevant, features that are all the same have no loss.
        alone = DataSet("set", ("a",), tuple(r for r in drawn_set().records if r.label == "a"), "one class")
        with pytest.raises(SketchFusionError, match="1 classes with"):
            Retrieval(alone)
        single = DataSet("set", ("a",), (*alone.photos, *alone.sketches[:2]), "one drawn photo")
        with pytest.raises(SketchFusionError, match="1 photos with sketches drawn from them"):
            Retrieval(single, level="fine")
        with pytest.raises(ConfigError, match="category, fine"):
            Retrieval(drawn_set(), level="instance")


class TestRecognition:
    def test_a_linear_head_solves_what_is_linear(self) -> None:
        random = torch.Generator().manual_seed(0)
        centres = torch.randn(4, 6, generator=random) * torch.tensor([1.0, 100, 0.01, 1, 1, 1]) + 5
        labels = torch.arange(400) % 4
        noise = torch.randn(400, 6, generator=random) * torch.tensor([1.0, 100, 0.01, 1, 1, 1]) * 0.2
        features = centres[labels] + noise
        head = fit_linear(features[:200], labels[:200], 4)
        assert accuracy(head(features[200:]), labels[200:]) > 0.97
        assert not any(p.requires_grad for p in head.parameters())

    def test_accuracy(self) -> None:
        logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
        assert accuracy(logits, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)

    @pytest.mark.parametrize("hidden", [None, 5])
    def test_loss_is_cross_entropy_with_the_head(self, hidden: int | None) -> None:
        task = Recognition(drawn_set(), 7, hidden=hidden, batch_size=6, label_smoothing=0)
        assert task.classes == ("a", "b")
        records = task.batch(np.random.default_rng(0))
        pooled = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
        features = Features(pooled, None, collate([letterbox(8, 8, 8)] * 6))
        loss, parts = task.loss(features, [Sample(r, {}, None) for r in records])
        logits = task.head(pooled).log_softmax(1)
        expected = -sum(logits.detach()[i, "ab".index(str(r.label))] for i, r in enumerate(records)) / 6
        assert loss.item() == pytest.approx(float(expected))
        assert set(parts) == {"cross_entropy", "batch_accuracy"}

    def test_one_class_is_refused(self) -> None:
        only = DataSet("set", ("a",), tuple(r for r in drawn_set().records if r.label == "a"), "one")
        with pytest.raises(SketchFusionError, match="two or more"):
            Recognition(only, 4)


def positions(width: int, height: int, grid: int = 16, canvas: int = 64) -> Features:
    """Features of one image whose dense map says where each cell lies on the image, smoothly and uniquely."""
    geometry = letterbox(width, height, canvas)
    centres = (torch.arange(grid) + 0.5) / grid
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), 2).view(-1, 2)
    x, y = (geometry.to_original(points) / torch.tensor([width, height])).unbind(1)
    waves = [f(k * v * math.pi) for v in (x, y) for k in (0.5, 1.0) for f in (torch.sin, torch.cos)]
    dense = torch.stack(waves).view(-1, grid, grid)
    return Features(dense.amax((1, 2)), dense, geometry)


class TestCorrespondence:
    @pytest.mark.parametrize(("source", "target"), [((60, 60), (60, 60)), ((100, 50), (40, 80)), ((31, 64), (200, 90))])
    def test_a_point_finds_the_same_place_in_another_shape(
        self, source: tuple[int, int], target: tuple[int, int]
    ) -> None:
        points = torch.tensor([[0.2, 0.3], [0.5, 0.5], [0.85, 0.6]])
        found = match(positions(*source), positions(*target), points * torch.tensor(source))
        error = (found / torch.tensor(target) - points).abs().max()
        assert error < 0.06  # a cell is 1/16 of the longer side

    def test_what_is_found_lies_inside(self) -> None:
        corners = torch.tensor([[0.0, 0.0], [100.0, 50.0]])
        found = match(positions(100, 50), positions(40, 80), corners)
        assert ((found >= 0) & (found <= torch.tensor([40, 80]))).all()

    def test_outside_and_without_a_map(self) -> None:
        with pytest.raises(SketchFusionError, match="outside"):
            match(positions(10, 10), positions(10, 10), [[11.0, 3.0]])
        bare = Features(torch.zeros(4), None, letterbox(8, 8, 8))
        with pytest.raises(SketchFusionError, match="dense=True"):
            match(positions(10, 10), bare, [[1.0, 3.0]])

    def test_pck(self) -> None:
        truth = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        found = torch.tensor([[3.0, 4.0], [0.0, 5.01], [0.0, 0.0]])
        assert pck(found, truth, 100, 0.05).tolist() == [True, False, True]

    def test_loss_is_least_where_descriptors_agree(self) -> None:
        points = (("eye", 10.0, 12.0), ("tail", 40.0, 30.0))
        task = Correspondence(drawn_set(points), pairs=1)
        records = task.batch(np.random.default_rng(0))
        assert [r.kind for r in records] == ["sketch", "photo"]
        samples = [Sample(r, {n: (x, y) for n, x, y in r.points}, None) for r in records]
        one = positions(50, 50)
        assert one.dense is not None
        other = one.dense.flip(2)

        def cost(dense: torch.Tensor) -> float:
            batch = Features(None, torch.stack([one.dense, dense]), collate([one.geometry] * 2))
            return task.loss(batch, samples)[0].item()

        assert cost(one.dense) < 0.5 * cost(other)

    def test_points_that_left_the_picture_cost_nothing(self) -> None:
        task = Correspondence(drawn_set((("eye", 1.0, 1.0),)), pairs=1)
        records = task.batch(np.random.default_rng(0))
        dense = torch.rand(2, 4, 8, 8, requires_grad=True)
        loss, _ = task.loss(
            Features(None, dense, collate([letterbox(8, 8, 8)] * 2)), [Sample(r, {}, None) for r in records]
        )
        loss.backward()
        assert loss.item() == 0
        assert dense.grad is not None

    def test_no_pairs(self) -> None:
        with pytest.raises(SketchFusionError, match="shares a key point"):
            Correspondence(drawn_set())


def half_and_half(width: int = 40, height: int = 20, canvas: int = 64, grid: int = 16) -> tuple[Features, torch.Tensor]:
    """An image whose left half points one way in feature space and whose right half another; and the left mask."""
    geometry = letterbox(width, height, canvas)
    dense = torch.zeros(2, grid, grid)
    dense[0, :, : grid // 2], dense[1, :, grid // 2 :] = 1, 1
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, : width // 2] = True
    return Features(dense.amax((1, 2)), dense, geometry), mask


class TestSegmentation:
    def test_similarity_and_mask_in_original_pixels(self) -> None:
        photo, truth = half_and_half()
        cosines = similarity(torch.tensor([3.0, 0.0]), photo)
        assert cosines.shape == (20, 40)
        assert cosines[:, :15].min() > 0.99
        assert cosines[:, 25:].max() < 0.01
        assert mask_iou(predict(cosines, 0.5), truth) > 0.9
        assert THRESHOLD == 0.47

    def test_similarity_is_sampled_at_the_centres_of_pixels(self) -> None:
        grid, (width, height) = 8, (40, 20)
        angles = torch.linspace(0.2, 1.2, grid)
        dense = torch.stack([angles.cos(), angles.sin()])[:, None].expand(2, grid, grid)
        cosines = similarity(torch.tensor([1.0, 0.0]), Features(None, dense, letterbox(width, height, 64)))
        cells = (np.arange(width) + 0.5) / width * grid - 0.5
        expected = np.interp(cells, np.arange(grid), angles.cos().numpy())
        np.testing.assert_allclose(cosines.numpy(), np.tile(expected, (height, 1)), atol=1e-5)

    def test_a_mask_that_does_not_fit_its_photo_is_named(self) -> None:
        photos = DataSet("set", ("a",), (Record("lying.jpg", "photo", "a", mask="standing.png"),), "all")
        task = Segmentation(photos, drawn_set(), pairs=1)
        records = task.batch(np.random.default_rng(0))
        features, mask = half_and_half()
        assert features.dense is not None
        batch = Features(torch.rand(2, 2), torch.stack([features.dense] * 2), collate([features.geometry] * 2))
        samples = [Sample(records[0], {}, mask.T), Sample(records[1], {}, None)]
        with pytest.raises(SketchFusionError, match=r"standing.png is 20 x 40 and its photo lying.jpg 40 x 20"):
            task.loss(batch, samples)

    def test_metrics_by_hand(self) -> None:
        ours = torch.tensor([[True, True], [False, False]])
        theirs = torch.tensor([[True, False], [True, False]])
        assert mask_iou(ours, theirs) == pytest.approx(1 / 3)
        assert pixel_accuracy(ours, theirs) == pytest.approx(1 / 2)
        empty = torch.zeros(2, 2, dtype=torch.bool)
        assert mask_iou(empty, empty) == 1
        assert mask_iou(ours, empty) == 0

    def test_mask_on_the_canvas(self) -> None:
        geometry = letterbox(40, 20, 64)
        mask = torch.zeros(20, 40)
        mask[:, :20] = 1
        placed = on_canvas(mask, geometry, 16)
        assert placed.shape == (16, 16)
        assert placed[4:12, :7].min() > 0.99  # the image fills rows 4 to 12
        assert placed[4:12, 9:].max() < 0.01
        assert placed[:4].max() == placed[12:].max() == 0

    def test_loss_wants_the_mask_for_its_own_class_only(self) -> None:
        photo, mask = half_and_half()
        photos = DataSet(
            "voc", ("a", "b"), (Record("1", "photo", "a", mask="m"), Record("2", "photo", "b", mask="m")), ""
        )
        task = Segmentation(photos, drawn_set(), pairs=2)
        samples = [Sample(r, {}, mask) for r in photos.records] + [
            Sample(Record("s", "sketch", label), {}, None) for label in "ab"
        ]
        geometry = collate([photo.geometry] * 4)
        dense = torch.zeros(4, 3, 16, 16)
        assert photo.dense is not None
        dense[0, :2] = photo.dense
        dense[1, 2] = photo.dense[0]
        dense[1, 1] = photo.dense[1]
        right = torch.tensor([[0.0] * 3, [0.0] * 3, [1.0, 0, 0], [0.0, 0, 1.0]])

        def cost(pooled: torch.Tensor) -> dict[str, float]:
            return task.loss(Features(pooled, dense, geometry), samples)[1]

        swapped = right[[0, 1, 3, 2]]
        assert cost(right)["mask"] < 0.2 * cost(swapped)["mask"]
        assert cost(right)["others"] < 0.2 * cost(swapped)["others"]

    def test_what_a_photo_shows_is_not_to_be_missed_in_it(self) -> None:
        """A cat and a dog on one photo are two records of it, each with its own mask."""
        mask, (photo, _) = torch.ones(20, 40, dtype=torch.bool), half_and_half()
        records = tuple(Record("1", "photo", label, mask="m") for label in "ab")
        task = Segmentation(DataSet("voc", ("a", "b"), records, ""), drawn_set(), pairs=1)
        samples = [Sample(records[0], {}, mask), Sample(records[1], {}, mask)]
        samples += [Sample(Record("s", "sketch", label), {}, None) for label in "ab"]
        features = Features(torch.ones(4, 3), torch.ones(4, 3, 16, 16), collate([photo.geometry] * 4))
        assert task.loss(features, samples)[1]["others"] == 0

    def test_no_class_in_common(self) -> None:
        photos = DataSet("voc", ("z",), (Record("1", "photo", "z", mask="m"),), "all")
        with pytest.raises(SketchFusionError, match="under the same name"):
            Segmentation(photos, drawn_set())


def test_what_does_not_fit_together_is_refused() -> None:
    geometry = letterbox(40, 30, 64)
    one = Features(torch.rand(4), torch.rand(4, 8, 8), geometry, model="one")
    two, several = replace(one, model="two"), Features.cat([one, one])
    assert torch.equal(similarity(one, one), similarity(one.pooled, one))
    for run in (lambda: match(one, two, [[1, 1]]), lambda: similarity(one, two), lambda: search(one, two, 1)):
        with pytest.raises(SketchFusionError, match="models one and two"):
            run()
    for run in (
        lambda: match(one, several, [[1, 1]]), lambda: similarity(several, one), lambda: similarity(one, several),
    ):  # fmt: skip
        with pytest.raises(SketchFusionError, match="index the batch"):
            run()
    with pytest.raises(SketchFusionError, match="masks"):
        mask_iou(torch.ones(2, 3) > 0, torch.ones(1, 3) > 0)
    with pytest.raises(SketchFusionError, match="masks"):
        pixel_accuracy(torch.ones(2, 3) > 0, torch.ones(1, 3) > 0)
    with pytest.raises(SketchFusionError, match="points"):
        pck(torch.zeros(3, 2), torch.zeros(1, 2), 10, 0.1)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="k: is"):
            search(one, one, k)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["numpy", "no dense map"])
def test_what_cannot_be_matched_or_searched_says_why(missing: str) -> None:
    geometry = letterbox(40, 30, 64)
    whole = Features(pooled=torch.randn(4), dense=torch.randn(4, 8, 8), geometry=geometry)
    other = whole.numpy() if missing == "numpy" else Features(pooled=whole.pooled, dense=None, geometry=geometry)
    for run in (
        lambda: match(whole, other, [[1.0, 1.0]]),
        lambda: match(other, whole, [[1.0, 1.0]]),
        lambda: similarity(whole.pooled, other),
    ):
        with pytest.raises(SketchFusionError, match="dense=True"):
            run()
