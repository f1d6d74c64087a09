from kevlarflow.bench.evaluation import cells, suite
from kevlarflow.bench.evaluation.cells import FAULTS, RATES, SETTINGS, SUITES, SYSTEMS, Cell


def test_the_full_suite_is_at_most_forty_cells_each_once_each_with_a_reason():
    names = [cell.name for cell in SUITES["full"]]
    assert len(names) == len(set(names)) <= 40
    assert all(cell.why for cell in SUITES["full"])


def test_every_cell_is_made_of_known_parts():
    for cell in SUITES["full"] + SUITES["quick"]:
        assert cell.setting in SETTINGS
        assert (cell.system in SYSTEMS, cell.rate in RATES, cell.fault in FAULTS) == (True, True, True)


def test_the_quick_suite_takes_less_than_ten_minutes():
    assert sum(map(suite.expected_seconds, SUITES["quick"])) < 600


def test_two_faults_strike_different_pipelines_and_stages():
    one, other = cells.strikes(Cell("a10-2x4-1g", "stock", "near", "two"))
    assert (one.pipeline, one.stage) != (other.pipeline, other.stage)
    assert one.pipeline != other.pipeline
    assert other.after_seconds > one.after_seconds


def test_each_stage_can_be_hit():
    stages = [cells.strikes(Cell("a10-2x4-1g", "stock", "near", fault))[0].stage for fault in FAULTS[1:4]]
    assert stages == [0, 2, 3]


def test_all_systems_get_the_same_load():
    loads = {str(cells.workload(Cell("real-2x2", system, "near", fault))) for system in SYSTEMS for fault in FAULTS}
    assert len(loads) == 1
