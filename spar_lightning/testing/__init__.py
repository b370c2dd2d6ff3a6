"""Interface checks for authors of a backbone: they verify that a class implements `backbones.base.Backbone`.

    checks = backbone_checks(lambda: MyBackbone(pretrained=None))

    @pytest.mark.parametrize("check", checks, ids=str)
    def test_contract(check):
        check()

`spar backbones check CLASS` runs the checks without pytest. Each check creates its backbones with the
factory, which should return a small network with random weights.
"""

from typing import Final

from spar_lightning.testing import features, package, parameters, positions, text
from spar_lightning.testing.check import Check as Check
from spar_lightning.testing.check import Factory
from spar_lightning.testing.reference import Reference, reference_check

# Checks, and the method that each tests; basic ones first, because their errors explain others.
CHECKS: Final = [
    (features.attributes_are_consistent, "__init__"),
    (features.shapes_square_wide_tall, "project"),
    (features.other_sides_raise_an_error, "embed"),
    (positions.patches_are_row_major, "embed"),
    (positions.project_keeps_the_order, "project"),
    (positions.table_fits_the_window, "__init__"),
    (positions.positions_are_resized, "embed"),
    (positions.positions_affect_the_features, "embed"),
    (features.inputs_stay_unchanged, "embed"),
    (features.splitting_the_blocks_is_exact, "run_blocks"),
    (features.packed_sequence_equals_its_images, "run_blocks"),
    (features.windowed_attention_is_local, "run_blocks"),
    (features.batch_equals_its_images, "run_blocks"),
    (features.deterministic, "run_blocks"),
    (features.bf16_autocast_is_close, "run_blocks"),
    (parameters.stays_in_eval_mode, "train"),
    (parameters.groups_are_complete, "parameter_groups"),
    (parameters.gradients_reach_what_is_trained, "parameter_groups"),
    (parameters.every_group_affects_the_features, "parameter_groups"),
    (parameters.weights_round_trip, "load_vision_state_dict"),
    (parameters.pickles_and_copies, "__init__"),
    (text.text_tower_is_not_a_submodule, "build_text_tower"),
    (text.text_embeddings_are_valid, "build_text_tower"),
    (package.found_by_short_name, "__init__"),
    (package.import_is_fast, "__init__"),
]


def backbone_checks(factory: Factory, reference: Reference | None = None) -> list[Check]:
    """Return all interface checks for the backbone that `factory` creates.

    Args:
        factory: Function that returns a new backbone, small and with random weights.
        reference: Function from a backbone and images (1, 3, H, W) uint8 to the features of the original library, with
            the weights of the backbone. Rotary embeddings, mean and std can only be checked with it.
    """
    checks = [Check(run, method, factory) for run, method in CHECKS]
    if reference is not None:
        checks.append(Check(reference_check(reference), "run_blocks", factory))
    return checks
