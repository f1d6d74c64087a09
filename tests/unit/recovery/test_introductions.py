"""Who is asked twice for an introduction answers twice: the second answer changes nothing."""

from kevlarflow.recovery import events
from kevlarflow.types import PipelineState
from toy_world import ToyWorld, make_config


def test_an_engine_that_introduces_itself_twice_to_a_restarted_controller_serves_on():
    world = ToyWorld(make_config())
    world.do(events.ClusterBegun())
    world.heal()
    world.restart_controller()
    assert all(each.state is PipelineState.SERVING for each in world.cluster.pipelines)
    for pipeline, engine in world.engines.items():
        assert not world.do(events.EngineAttached(pipeline, engine.pid, engine.epoch, engine.members))
    assert world.all_serve_at_home
