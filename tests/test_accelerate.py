"""accelerate(): an accelerated torchvision detector gives what it gave before."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from detections import assert_same_detections
from test_models_convert import MODELS, batch, resnet18_fpn, with_many_detections
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FCOS, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import focalops
from focalops import accelerate
from focalops.accelerate import HeadOutputs
from models.retinanet import RetinaNet as ReferenceRetinaNet


class Wrapper(nn.Module):
    """As other projects hold their detector."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model(*arguments)


def assert_same(accelerated: nn.Module, original: nn.Module) -> None:
    """Losses, gradients and hundreds of detections."""
    images, targets = batch()
    losses = []
    for model in (original, accelerated):
        model.train().zero_grad()
        torch.manual_seed(5)  # for the size that is drawn
        losses.append(model(images, targets))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    for key, loss in losses[0].items():
        assert loss > 0
        torch.testing.assert_close(losses[1][key], loss, rtol=1e-5, atol=0)
    gradients = {name: p.grad for name, p in accelerated.named_parameters()}
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            # Of the largest gradient of the tensor: sums of thousands of terms of either sign.
            bound = 1e-4 * parameter.grad.abs().max() + 1e-12
            assert (gradients[name] - parameter.grad).abs().max() <= bound, name
    with torch.no_grad():
        found, expected = accelerated.eval()(images), original.eval()(images)
    assert sum(len(e["boxes"]) for e in expected) > 300
    for a, b in zip(found, expected, strict=True):
        assert_same_detections(a, b, scores=(1e-5, 1e-6), boxes=(1e-5, 1e-3))


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original(name: str) -> None:
    original = with_many_detections(MODELS[name]())
    model = Wrapper(copy.deepcopy(original))
    keys = list(model.state_dict())
    report = accelerate(model)
    assert report.kept == []
    assert str(report).splitlines() == [
        "replaced: model: the loss step",
        "replaced: model: the post-processing",
        "replaced: model: the copies of the heads' outputs",
    ]
    assert list(model.state_dict()) == keys
    assert_same(model.model, original)


@pytest.mark.parametrize("loss", ["smooth_l1", "diou", "ciou"])
def test_box_losses(loss: str) -> None:
    original = with_many_detections(resnet18_fpn())
    original.head.regression_head._loss_type = loss
    for coder in (original.box_coder, original.head.regression_head.box_coder):
        coder.weights = (2.0, 2.0, 1.0, 0.5)
    model = copy.deepcopy(original)
    assert accelerate(model).kept == []
    assert_same(model, original)


def test_numbers_may_change_afterwards_and_copies_are_their_own() -> None:
    original = with_many_detections(resnet18_fpn())
    model = copy.deepcopy(original)
    accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        changed = copy.deepcopy(original)
        for net in (twin, changed):
            net.score_thresh, net.detections_per_img, net.nms_thresh = 0.1, 150, 0.3
        assert_same(twin, changed)
    assert model.score_thresh == 0.05


class OwnLoss(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        assert isinstance(head_outputs["cls_logits"], torch.Tensor)
        return {k: 2 * v for k, v in super().compute_loss(targets, head_outputs, anchors).items()}


class OwnForward(RetinaNet):
    def forward(self, images, targets=None):
        features = list(self.backbone(images[0][None]).values())
        assert not isinstance(self.head(features)["cls_logits"], HeadOutputs)
        return super().forward(images, targets)


def own_matcher(model: RetinaNet) -> None:
    model.proposal_matcher = lambda quality: quality.argmax(dim=0)


def own_post_processing(model: RetinaNet) -> None:
    model.postprocess_detections = lambda *arguments: []


@pytest.mark.parametrize(
    ("change", "kept", "replaced"),
    [
        (
            lambda m: setattr(m, "__class__", OwnLoss),
            ["the loss step, because model.compute_loss is overridden by OwnLoss"],
            ["the post-processing"],
        ),
        (
            own_matcher,
            ["the loss step, because model.proposal_matcher is no Matcher but function"],
            ["the post-processing"],
        ),
        (
            own_post_processing,
            ["the post-processing, because model.postprocess_detections is the instance's own"],
            ["the loss step"],
        ),
        (
            lambda m: setattr(m, "anchor_generator", AnchorGenerator(((9,),) * 9, ((1.0,),) * 9)),
            [
                f"{part}, because model.anchor_generator has more than 8 levels"
                for part in ("the loss step", "the post-processing")
            ],
            [],
        ),
        (
            lambda m: setattr(m.head.regression_head, "_loss_type", "huber"),
            ["the loss step, because model.head.regression_head has the unknown box loss 'huber'"],
            ["the post-processing"],
        ),
    ],
)
def test_what_is_not_torchvisions_is_kept(change, kept: list[str], replaced: list[str]) -> None:
    model = resnet18_fpn()
    change(model)
    report = accelerate(model)
    assert [line.split(" and ")[0] for line in report.kept] == [f"model: {line}" for line in kept]
    assert report.replaced == [f"model: {line}" for line in replaced]


def test_a_kept_part_gets_what_it_expects() -> None:
    original = with_many_detections(resnet18_fpn())
    for kind, number in ((OwnLoss, 1), (OwnForward, 1)):
        original.__class__ = kind
        model = copy.deepcopy(original)
        assert len(accelerate(model).kept) == number
        assert_same(model, original)


def test_a_second_call_changes_nothing() -> None:
    model = resnet18_fpn()
    accelerate(model)
    report = accelerate(model)
    assert report.replaced == []
    assert "model.compute_loss is focalops' already" in report.kept[0]


def replica(net: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for its second device, here on the CPU and with other weights."""
    of = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, copied in of.items():
        for name, child in module._modules.items():
            copied._modules[name] = child if child is None else of[child]
        for name, tensor in module._parameters.items():
            setattr(copied, name, tensor if tensor is None else tensor.detach() * 0.95)
        copied._buffers = module._buffers.copy()
    return of[net]


@pytest.mark.parametrize("duplicate", [replica, copy.copy, copy.deepcopy])
def test_a_copy_computes_with_its_own_weights_and_settings(duplicate) -> None:
    original = with_many_detections(resnet18_fpn())
    model = copy.deepcopy(original)
    accelerate(model)
    twin, plain = duplicate(model), duplicate(original)
    for net in (twin, plain):
        net.score_thresh, net.detections_per_img = 0.06, 40
    images, targets = batch()
    with torch.no_grad():
        found, expected = twin.eval()(images), plain.eval()(images)
    assert [len(f["boxes"]) for f in found] == [len(e["boxes"]) for e in expected] == [40] * 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-5, atol=1e-6)
    losses = []
    for net in (twin, plain):
        torch.manual_seed(5)
        losses.append(net.train()(images, targets))
    for key, loss in losses[1].items():
        torch.testing.assert_close(losses[0][key], loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", ["small_fcos", "small_ssd"])
def test_copies_of_fcos_and_ssd_have_their_own_settings(make: str) -> None:
    model = globals()[make]()
    accelerate(model)
    images, _ = batch()
    twin = copy.copy(model)
    twin.detections_per_img = 3
    with torch.no_grad():
        assert [len(found["boxes"]) for found in twin.eval()(images)] == [3] * 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is (deprecated|not supported)")
@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="torch.jit.script does not know this Python"
)
def test_script_is_refused_in_a_sentence() -> None:
    model = Wrapper(resnet18_fpn())
    accelerate(model)
    sentence = r"focalops\.accelerate\(RetinaNet\) has no TorchScript: use torch\.compile or"
    with pytest.raises(NotImplementedError, match=sentence):
        torch.jit.script(model)


def test_the_head_gives_torchvisions_outputs_to_whoever_looks() -> None:
    """To a hook, and to one who calls it from outside."""
    original = with_many_detections(resnet18_fpn())
    model = copy.deepcopy(original)
    accelerate(model)
    images, _ = batch()
    features = [torch.rand(1, 256, 8, 8), torch.rand(1, 256, 4, 4)]
    with torch.no_grad():
        for key, value in original.head(features).items():
            assert torch.equal(model.head(features)[key], value)
    seen: dict[nn.Module, list] = {model: [], original: []}
    for net, outputs in seen.items():
        for part in (net.head, net.head.classification_head, net.head.regression_head):
            part.register_forward_hook(lambda module, inputs, out, to=outputs: to.append(out))
    assert_same(model, original)
    assert len(seen[model]) == len(seen[original]) == 6  # three parts, training and evaluation
    logits, expected = seen[model][0], seen[original][0]
    torch.testing.assert_close(logits.sigmoid().amax(dim=2), expected.sigmoid().amax(dim=2))
    seen_by_all: list = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: seen_by_all.append(out)
    )
    try:
        accelerated = copy.deepcopy(resnet18_fpn())
        accelerate(accelerated)
        with torch.no_grad():
            accelerated.eval()(images)
    finally:
        handle.remove()
    assert not any(isinstance(output, HeadOutputs) for output in seen_by_all)


def test_the_loss_step_of_levels_asks_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows are gathered, nothing is concatenated."""
    model = resnet18_fpn()
    accelerate(model)
    images, targets = batch()

    def refuse(*arguments, **options):
        raise AssertionError("torch.where waits for the device")

    model.train()(images, targets)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "where", refuse)
        patch.setattr(torch.Tensor, "nonzero", refuse)
        levels = [torch.rand(3, 6, 4, 4, requires_grad=True)]
        deltas = [torch.rand(3, 8, 4, 4, requires_grad=True)]
        outputs = {"cls_logits": HeadOutputs(levels, 3), "bbox_regression": HeadOutputs(deltas, 4)}
        anchors = torch.rand(32, 4) * 30
        anchors[:, 2:] += 40
        losses = model.compute_loss(targets, outputs, [anchors] * 3)
        sum(losses.values()).backward()
    assert deltas[0].grad is not None


LABELS = {
    "a class too many": ([1, 3], r"gt_labels\[0\] must lie in \[0, 2\], got 3"),
    "ignored": ([-100, 1], r"gt_labels\[0\] must lie in \[0, 2\], got -100"),
    "one too few": ([2], r"matches\[0\] must lie in \[-2, 0\], as gt_labels\[0\] has 1 labels"),
}


@pytest.mark.parametrize("make", ["resnet18_fpn", "small_fcos"])
@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_classes(make: str, case: str) -> None:
    model = globals()[make]()
    accelerate(model)
    labels, sentence = LABELS[case]
    images, targets = batch()
    boxes = torch.tensor([[10.0, 10, 40, 50], [30, 20, 60, 60]])
    targets = [{"boxes": boxes, "labels": torch.tensor(labels)}, *targets[1:]]
    num_classes = 3
    assert model.head.classification_head.num_classes == num_classes
    with pytest.raises(ValueError, match=sentence):
        model.train()(images, targets)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "boxes": t["boxes"].double()},
        lambda t: {**t, "boxes": t["boxes"].long()},
        lambda t: {**t, "boxes": tv_tensors.BoundingBoxes(t["boxes"], format="XYXY", canvas_size=(70, 90))},
        lambda t: {**t, "labels": t["labels"].int()},
        lambda t: {**t, "iscrowd": torch.zeros(len(t["labels"])).long(), "area": t["labels"], "image_id": 3},
    ],
)  # fmt: skip
def test_targets_in_every_form_that_torchvision_takes(change) -> None:
    """The first image's alone, so that a batch has them in two forms; also by the RetinaNet of models/."""
    original = with_many_detections(resnet18_fpn())
    model = copy.deepcopy(original)
    accelerate(model)
    ours = ReferenceRetinaNet.from_torchvision(original)
    images, targets = batch()
    targets = [change(targets[0]), *targets[1:]]
    losses = []
    for net in (original, model, ours):
        torch.manual_seed(5)
        losses.append(net.train()(images, targets))
    for found in losses[1:]:
        for key, loss in losses[0].items():
            # Of float64 boxes torchvision's regression loss is float64, here that of the deltas.
            torch.testing.assert_close(found[key].double(), loss.double(), rtol=1e-5, atol=0)


def test_an_accelerated_model_has_the_same_class_name_and_can_be_converted() -> None:
    original = resnet18_fpn()
    model = copy.deepcopy(original)
    accelerate(model)
    assert isinstance(model, RetinaNet) and repr(model) == repr(original)
    assert ReferenceRetinaNet.from_torchvision(model).config == (
        ReferenceRetinaNet.from_torchvision(original).config
    )


def test_focalops_anchors_in_an_accelerated_model() -> None:
    original = with_many_detections(resnet18_fpn())
    model = copy.deepcopy(original)
    generator = original.anchor_generator
    model.anchor_generator = focalops.AnchorGenerator(generator.sizes, generator.aspect_ratios)
    assert accelerate(model).kept == []
    assert_same(model, original)
    ReferenceRetinaNet.from_torchvision(model)


def small_fcos() -> FCOS:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    # Fewer detections than candidates, of a level and of an image.
    options = {"topk_candidates": 60, "detections_per_img": 150, "nms_thresh": 0.5}
    model = FCOS(backbone, 3, min_size=64, max_size=96, score_thresh=0.05, **options)
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight *= 30
        model.head.classification_head.cls_logits.bias.fill_(-1)
        model.head.regression_head.bbox_reg.weight *= 10
        model.head.regression_head.bbox_reg.bias.fill_(1)
    return model


def small_ssd() -> nn.Module:
    options = {"score_thresh": 0.05, "topk_candidates": 30, "detections_per_img": 400}
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=6, **options
    )
    model.eval()
    with torch.no_grad():
        features = list(model.backbone(torch.rand(2, 3, 320, 320)).values())
        for head, std in ((model.head.classification_head, 2.0), (model.head.regression_head, 1.0)):
            for module, feature in zip(head.module_list, features, strict=True):
                module[1].weight *= std / module(feature).std()
    return model


@pytest.mark.parametrize("make", ["resnet18_fpn", "small_fcos", "small_ssd"])
def test_detections_have_the_gradient_of_the_original(make: str) -> None:
    torch.manual_seed(0)
    original = globals()[make]()
    original = with_many_detections(original) if make == "resnet18_fpn" else original
    model = copy.deepcopy(original)
    accelerate(model)
    images = [image.requires_grad_() for image in batch()[0]]
    grads = []
    for net in (original, model):
        found = net.eval()(images)
        total = sum(f["scores"].sum() + f["boxes"].sum() / 100 for f in found)
        grads.append(torch.autograd.grad(total, images))
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    ("make", "replaced"),
    [
        (
            small_fcos,
            ["model.head: the losses", "model: the matching", "model: the post-processing"],
        ),
        (small_ssd, ["model: the post-processing"]),
    ],
)
def test_fcos_and_ssd_equal_the_originals(make, replaced, monkeypatch) -> None:
    # Its other way moves classes apart by offsets, which round the coordinates.
    monkeypatch.setattr(box_ops, "_batched_nms_coordinate_trick", box_ops._batched_nms_vanilla)
    torch.manual_seed(0)
    original = make()
    model = Wrapper(copy.deepcopy(original))
    report = accelerate(model)
    assert report.replaced == replaced and report.kept == []
    images, targets = batch()
    with torch.no_grad():
        expected = original.eval()(images)
        with monkeypatch.context() as peer:
            peer.setattr(type(original), "postprocess_detections", None)
            found = model.model.eval()(images)
    assert sum(len(e["boxes"]) for e in expected) > 200
    for a, b in zip(found, expected, strict=True):
        assert_same_detections(a, b, scores=(1e-5, 1e-6), boxes=(1e-5, 1e-3))
    if make is small_ssd:  # class 0 is background, and its batch norms need two images
        for target in targets:
            target["labels"] = target["labels"] + 1
    losses = []
    for net in (original, model.model):
        net.train().zero_grad()
        torch.manual_seed(5)
        losses.append(net(images, targets))
        sum(losses[-1].values()).backward()
    for key, loss in losses[0].items():
        torch.testing.assert_close(losses[1][key], loss, rtol=1e-5, atol=0)
    gradients = {name: p.grad for name, p in model.model.named_parameters()}
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            bound = 1e-4 * parameter.grad.abs().max() + 1e-9
            assert (gradients[name] - parameter.grad).abs().max() <= bound, name
    assert "focalops' already" in accelerate(model).kept[0]


def test_what_fcos_and_ssd_override_is_kept() -> None:
    model = nn.ModuleList([small_fcos(), small_ssd()])
    model[0].head.compute_loss = lambda *arguments: {}
    model[0].anchor_generator.sizes = ((8,), (16,), (33,), (64,), (128,))
    model[1].box_coder = None
    assert accelerate(model).kept == [
        "0.head: the losses, because 0.head.compute_loss is the instance's own",
        *(
            f"0: the {part}, because 0.anchor_generator has other anchors than one square of even size a position"
            for part in ("matching", "post-processing")
        ),
        "1: the post-processing, because 1.box_coder is no BoxCoder but NoneType",
    ]


def test_no_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "must be or hold a RetinaNet, FCOS or SSD of torchvision or a detector of ultralytics, got Linear"
    with pytest.raises(ValueError, match=message):
        accelerate(nn.Linear(1, 1))
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)  # not installed
    with pytest.raises(ValueError, match="got RetinaNet"):
        accelerate(resnet18_fpn())
