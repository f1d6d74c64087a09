"""Random histories: whatever happens, every invariant holds after every event, and in the end everything serves."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kevlarflow.recovery import events
from kevlarflow.types import Epoch, Phases
from toy_world import ToyWorld, make_config


class History(RuleBasedStateMachine):
    """One cluster and what befalls it."""

    @initialize(stages=st.integers(1, 4), pipelines=st.integers(1, 4), lanes=st.integers(1, 4), data=st.data())
    def start(self, stages, pipelines, lanes, data):
        """Nodes and engines appear in any order; then everything serves."""
        self.world = ToyWorld(make_config(stages, pipelines), lanes)
        self.world.do(events.ClusterBegun())
        arrivals = [*self.world.those("starting"), *self.world.engines]
        for arrival in data.draw(st.permutations(arrivals)):
            if isinstance(arrival, int):
                self.world.attach(arrival)
            else:
                self.world.make_ready(arrival)
        self.world.heal()
        assert not self.world.cluster.recoveries

    def pick(self, data, choices):
        return data.draw(st.sampled_from(sorted(choices)))

    @precondition(lambda self: self.world.those("ready"))
    @rule(data=st.data(), noticed=st.booleans())
    def crash(self, data, noticed):
        member = self.pick(data, self.world.those("ready"))
        self.world.crash(member)
        if noticed:
            self.world.notice(member)

    @precondition(lambda self: self.world.those("dead"))
    @rule(data=st.data())
    def notice(self, data):
        self.world.notice(self.pick(data, self.world.those("dead")))

    @precondition(lambda self: self.world.those("starting"))
    @rule(data=st.data())
    def become_ready(self, data):
        self.world.make_ready(self.pick(data, self.world.those("starting")))

    @precondition(lambda self: self.world.those("starting"))
    @rule(data=st.data(), why=st.sampled_from(["says", "launcher", "exits"]))
    def fail_to_start(self, data, why):
        member = self.pick(data, self.world.those("starting"))
        slot = self.world.cluster.slots[member.node]
        del self.world.processes[member]
        if why == "says":
            self.world.do(events.NodeFailed(member, "no memory"))
        elif why == "launcher" and not slot.pids:
            self.world.do(events.LaunchFailed(member, "no launcher"))
        else:
            self.world.do(events.NodeExited(member, self.world.now))

    @precondition(lambda self: self.world.those("ready"))
    @rule(data=st.data(), ends=st.sampled_from(["beats again", "stays silent", "is stuck"]))
    def fall_silent(self, data, ends):
        member = self.pick(data, self.world.those("ready"))
        self.world.do(events.NodeSuspected(member, self.world.now - 1.0))
        if ends == "beats again":
            self.world.do(events.NodeCleared(member))
        elif ends == "stays silent":
            self.world.do(events.NodeSilent(member, self.world.now - 3.0))

    @precondition(lambda self: self.world.those("starting"))
    @rule(data=st.data())
    def stop_as_it_loads(self, data):
        member = self.pick(data, self.world.those("starting"))
        self.world.do(events.NodeSilent(member, self.world.now - 0.3, "was stopped"))

    @rule(data=st.data())
    def node_is_drained(self, data):
        self.world.do(events.DrainRequested(self.pick(data, self.world.cluster.slots), 1))

    @rule(data=st.data())
    def node_is_started_by_hand(self, data):
        self.world.join_by_hand(self.pick(data, self.world.cluster.slots))

    @rule(data=st.data())
    def engine_answers(self, data):
        self.world.answer(self.pick(data, self.world.engines))

    @rule(data=st.data(), running=st.sampled_from([0, 0, 5]))
    def engine_reports(self, data, running):
        self.world.report(self.pick(data, self.world.engines), running)

    @rule(data=st.data())
    def engine_restarts(self, data):
        pipeline = self.pick(data, self.world.engines)
        if self.world.engines[pipeline] is None:
            self.world.attach(pipeline)
        else:
            self.world.lose_engine(pipeline)

    @rule(data=st.data(), behind=st.integers(1, 3))
    def stale_answer_arrives(self, data, behind):
        pipeline = self.world.cluster.pipelines[self.pick(data, self.world.engines)]
        before = (pipeline.state, list(pipeline.members), pipeline.formed)
        epoch = Epoch(max(0, pipeline.epoch - behind))
        self.world.do(events.Formed(pipeline.id, epoch, Phases(), 0, 0, 0))
        if not self.world.cluster.commands:
            assert (pipeline.state, list(pipeline.members), pipeline.formed) == before

    @rule(data=st.data())
    def engine_complains(self, data):
        pipeline = self.world.cluster.pipelines[self.pick(data, self.world.engines)]
        members = [member for member in pipeline.members if member is not None]
        if members:
            member = self.pick(data, members)
            self.world.do(events.MemberFailed(pipeline.id, pipeline.epoch, member, "refused"))

    @rule(data=st.data())
    def member_of_the_past_speaks(self, data):
        slot = self.world.cluster.slots[self.pick(data, self.world.cluster.slots)]
        if slot.incarnation > 1:
            old = slot.member.__class__(slot.node, slot.incarnation - 1)
            self.world.do(events.NodeStarting(old, "here", (9,)))
            self.world.do(events.NodeExited(old, self.world.now))
            self.world.do(events.NodeSuspected(old, self.world.now))
            self.world.do(events.NodeSilent(old, self.world.now))

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.5, 5.0]))
    def time_passes(self, seconds):
        self.world.tick(seconds)

    @rule(remembers=st.booleans())
    def controller_restarts(self, remembers):
        self.world.restart_controller(remembers=remembers)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.heal()


History.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestHistories = History.TestCase
