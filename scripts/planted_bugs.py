"""The protocol bugs that `scripts/mutants.py` plants, one at a time: exact texts, so that code that moves is noticed.

Most take a safeguard away. What the simulator cannot find, since a second safeguard hides it, names the tests that can.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug: in `file`, below `src/kevlarflow`, `text` becomes `instead`.

    `tests`, a file or one test in it, is asked when the simulator finds nothing.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: str = ""


MUTANTS = (
    Mutant(
        "an engine believes results of an old epoch",
        "recovery/pipeline.py",
        "return self._executed(event, now) if event.epoch == self.epoch else []",
        "return self._executed(event, now)",
    ),
    Mutant(
        "a node runs work of an old epoch",
        "node/lanes.py",
        " or work.header.epoch != lane.epoch",
        "",
        "tests/unit/node/test_lanes.py",
    ),
    Mutant(
        "a lane goes on over a connection that was made anew",
        "node/lanes.py",
        "        if lane is None or engine == lane.engine:\n",
        "        if lane is not None:\n            lane.engine = engine\n        if True:\n",
        "tests/unit/node/test_lanes.py",
    ),
    Mutant(
        "nobody notices that a pipeline stands still",
        "recovery/standstill.py",
        "if report.still_seconds < self._patience:",
        "if True:",
    ),
    Mutant(
        "a lost Leave is not said again",
        "recovery/watched.py",
        "return [Leave(each.node) for each in due]",
        "return []",
        "tests/unit/recovery/test_watched.py",
    ),
    Mutant(
        "a lost Formed is not asked for again",
        "recovery/engines.py",
        "if behind or unanswered:",
        "if behind:",
        "tests/unit/recovery/test_engines.py",
    ),
    Mutant(
        "a node lets an old epoch open its lane",
        "node/lanes.py",
        "        if epoch <= self.epochs.get(pipeline, 0):\n            return None\n",
        "",
        "tests/unit/node/test_lanes.py",
    ),
    Mutant(
        "two lanes are given the same physical block",
        "node/block_map.py",
        "        self._free.difference_update(table)\n",
        "",
    ),
    Mutant(
        "the prefix cache is not evicted",
        "recovery/restoring.py",
        "        return [EvictPrefixCache(keep)]\n",
        "        return []\n",
    ),
    Mutant(
        "a thawed node is believed",
        "recovery/nodes.py",
        "if slot.incarnation == member.incarnation and slot.state is not NodeState.DEAD:",
        "if slot.state is not NodeState.DEAD:",
    ),
    Mutant(
        "a member of the past is taken for its successor",
        "recovery/grid.py",
        "return slot if slot is not None and slot.incarnation == member.incarnation else None",
        "return slot",
    ),
    Mutant(
        "the watermark is off by one block",
        "recovery/recompute.py",
        "                start += filled\n                if filled < block_size:\n",
        "                start += filled\n                if filled < block_size:\n                    start += 2\n",
    ),
    Mutant(
        "steps are issued again out of order",
        "recovery/in_flight.py",
        "        return due\n",
        "        return due[::-1]\n",
    ),
    Mutant(
        "the ledger shares its block lists with the scheduler",
        "recovery/ledger.py",
        "            blocks=list(admission.blocks),",
        "            blocks=admission.blocks,",
    ),
    Mutant(
        "a replica is taken without a look at its tag",
        "replication/store.py",
        "if entry is not None and _serves(entry.replica, replica):",
        "if entry is not None:",
        "tests/unit/replication/test_store.py",
    ),
    Mutant(
        "a standby drops replicas that are being put in place",
        "replication/store.py",
        "            self._pinned.add(pipeline)\n",
        "            pass\n",
    ),
    Mutant(
        "tokens are put behind whatever is there",
        "replication/store.py",
        "if entry is None or entry.replica.generation != replica.generation or entry.replica.filled < start:",
        "if entry is None:",
        "tests/unit/replication/test_store.py",
    ),
    Mutant(
        "a copy goes on from what the standby has dropped",
        "replication/queue.py",
        "0 if block in self._dropped else self._sent_of(replica)",
        "self._sent_of(replica)",
        "tests/unit/replication/test_queue.py",
    ),
    Mutant(
        "a copy is not looked at again after it was made",
        "replication/queue.py",
        "            if held is None or held.generation != replica.generation:\n                return None\n",
        "",
        "tests/unit/replication/test_queue.py",
    ),
    Mutant(
        "blocks of requests that ended count as theirs for ever",
        "recovery/coverage.py",
        "        for request in step.finished | step.preempted | admitted | resumed:\n",
        "        for request in step.preempted | admitted | resumed:\n",
    ),
    Mutant(
        "a full standby does not look at what replicas are worth",
        "replication/store.py",
        "        heapq.heappush(self._order, (replica.worth, ",
        "        heapq.heappush(self._order, (Worth.REQUEST, ",
        "tests/unit/replication/test_store.py",
    ),
    Mutant(
        "preempted requests keep their blocks in the ledger",
        "recovery/ledger.py",
        "        self.preempt(step.preempted)\n",
        "",
    ),
    Mutant(
        "prefix hits of steps in flight are forgotten",
        "recovery/recompute.py",
        "        needs += _hits(tokens, step, filled, given_away, through, last, limits.block_size)\n",
        "",
    ),
    Mutant(
        "prefix hits of a step that was being scheduled are forgotten",
        "recovery/pipeline.py",
        "        if lost:\n            chunks = plan_hits(",
        "        if False:\n            chunks = plan_hits(",
    ),
    Mutant(
        "blocks that were given away in flight count as whole",
        "recovery/recompute.py",
        "if entry.prompt_logprobs or not taken.isdisjoint(entry.blocks):",
        "if entry.prompt_logprobs:",
        "tests/unit/recovery/test_recompute.py",
    ),
    Mutant(
        "the epoch is not raised",
        "recovery/grid.py",
        "pipeline.epoch = Epoch(pipeline.epoch + 1)",
        "pipeline.epoch = Epoch(max(1, pipeline.epoch))",
    ),
    Mutant(
        "a donor is chosen that has no room",
        "recovery/planner.py",
        "each.foreign_lanes < each.info.lanes - 1",
        "each.foreign_lanes < each.info.lanes",
    ),
    Mutant(
        "a restarted controller gives epochs again",
        "recovery/cluster.py",
        "pipeline.epoch = snapshot.epochs.get(pipeline.id, Epoch(unused))",
        "pipeline.epoch = Epoch(0)",
    ),
    Mutant(
        "a stage counts as whole before it is recomputed",
        "recovery/forming.py",
        "return not (self.to_place or self.to_join or self.to_restore or self.chunks)",
        "return not (self.to_place or self.to_join)",
    ),
    Mutant(
        "a stage counts as whole before kept prefixes are in place",
        "recovery/lost_stages.py",
        " for stage, node in stages if stage not in self._resting}",
        " for stage, node in stages}",
        "tests/unit/recovery/test_claims.py",
    ),
    Mutant(
        "confirmations of any source and standby are believed",
        "recovery/pipeline.py",
        "if serves and self._watermarks.is_standby(event.stage, event.standby):",
        "if event.stage in self._watermarks.stages:",
        "tests/unit/recovery/test_pipeline.py",
    ),
    Mutant(
        "replicas of evicted blocks stay valid",
        "recovery/coverage.py",
        "        self.forget(self._generation.keys() - needed)\n",
        "        pass\n",
        "tests/unit/recovery/test_claims.py",
    ),
    Mutant(
        "missing replicas are not computed",
        "recovery/ahead.py",
        "if block not in missing}",
        "}",
    ),
    Mutant(
        "requests beyond a lane's share take part in steps in flight",
        "recovery/giving_way.py",
        "        books.in_flight.leave_out(found.requests, books.block_size)\n",
        "",
    ),
    Mutant(
        "who counts on a block that nobody fills is not set aside",
        "recovery/capacity.py",
        "return spoilt.isdisjoint(table) and (usable is None or usable.issuperset(table))",
        "return usable is None or usable.issuperset(table)",
        "tests/unit/recovery/test_capacity.py",
    ),
    Mutant(
        "blocks that were given to requests set aside count as untouched",
        "recovery/capacity.py",
        "        void=step.void.union(*(_fresh(step, request, block_size) for request in requests)),\n",
        "",
        "tests/unit/recovery/test_capacity.py",
    ),
    Mutant(
        "a step that was scheduled before a share changed is not looked at again",
        "recovery/giving_way.py",
        "        if step.formation >= self._changed_at:\n",
        "        if True:\n",
    ),
    Mutant(
        "a share that is over again is forgotten at once",
        "recovery/giving_way.py",
        "for each in (self.usable, *self._choices.values()) if",
        "for each in (self.usable,) if",
        "tests/unit/recovery/test_pipeline.py",
    ),
    Mutant(
        "a donor's own pipeline keeps all its blocks",
        "recovery/formation.py",
        "    if not waits and share == pipeline.shares:\n",
        "    if not waits:\n",
    ),
    Mutant(
        "a request that has not come as far as it was is acquitted",
        "recovery/suspicion.py",
        "if request in step.finished or ends.get(request, 0) >= suspect.end:",
        "if request in step.finished or request in ends:",
        "tests/unit/recovery/test_pipeline.py",
    ),
    Mutant(
        "a loss is held against all that was in flight",
        "recovery/in_flight.py",
        "        if unknown:\n            caught.append(self._may_have_run(unknown, forming))\n",
        "        caught.append(self._may_have_run(set(lost), forming))\n",
    ),
    Mutant(
        "what a node computed in the epoch before is not known",
        "recovery/dispatched.py",
        "self._requests.pop((computing.epoch, computing.sequence), Requests())",
        "self._requests.pop((self._epoch, computing.sequence), Requests())",
        "tests/unit/recovery/test_suspicion.py",
    ),
    Mutant(
        "a loss counts only in an order that is about it",
        "recovery/pipeline.py",
        "if order.lost or self.nodes[stage].member in told}",
        "if order.lost}",
        "tests/unit/recovery/test_suspicion.py",
    ),
    Mutant(
        "a node of two pipelines is held against both",
        "recovery/nodes.py",
        "        ours = slot.computing.pipeline == pipeline.id\n",
        "        ours = True\n",
        "tests/unit/recovery/test_losses.py",
    ),
    Mutant(
        "nobody is blamed while some node still prepares",
        "recovery/in_flight.py",
        "        if forming is None or any(map(forming.may_run, lost)):\n",
        "        if forming is None or forming.prepared:\n",
        "tests/unit/recovery/test_pipeline.py",
    ),
    Mutant(
        "copies of blocks that nobody fills stay valid",
        "recovery/giving_way.py",
        "        self._books.generations.forget(found.spoilt)\n",
        "",
        "tests/unit/recovery/test_pipeline.py",
    ),
    Mutant(
        "a stopped engine outlives a restart of the controller",
        "recovery/cluster.py",
        "        if pipeline.id in snapshot.engines:\n",
        "        if False:\n",
    ),
    Mutant(
        "only nodes that the controller knows of are left",
        "recovery/pipeline.py",
        "left = {*order.released, *self.nodes, *self._plans.opened} - {*order.nodes}",
        "left = {*order.released}",
        "tests/unit/recovery/test_pipeline.py"
        "::test_a_node_that_is_used_no_more_is_left_though_the_controller_has_forgotten_it",
    ),
    Mutant(
        "a hole in a prefix hit is overlooked",
        "recovery/recompute.py",
        "            if sorted(in_step) != in_step:\n",
        "            if False:\n",
        "tests/unit/recovery/test_capacity.py",
    ),
    Mutant(
        "the bound of a wait runs on when the pipeline serves again",
        "recovery/formation.py",
        "    pipeline.wait_until = None\n    if isinstance",
        "    if isinstance",
    ),
    Mutant(
        "nobody looks whether the bound of a wait has passed",
        "recovery/waiting.py",
        "return _lets_wait(pipeline) and grid.now >= (pipeline.wait_until or 0.0)",
        "return False",
    ),
    Mutant(
        "work for all requests that fails ends them at once",
        "recovery/pipeline.py",
        "        if self._failures > MAX_FAILURES:\n",
        "        if self._failures:\n",
    ),
    Mutant(
        "work for all requests that fails everywhere is tried for ever",
        "recovery/pipeline.py",
        "        if self._failures > MAX_FAILURES:\n",
        "        if False:\n",
        "tests/unit/recovery/test_pipeline.py",
    ),
    Mutant(
        "a pipeline that waits for a node keeps its lanes",
        "recovery/pipeline.py",
        "        return [Leave(node) for node in dict.fromkeys([*self.nodes, *opened])]\n",
        "        return []\n",
    ),
    Mutant(
        "a pipeline that waits for a node keeps what it has borrowed",
        "recovery/waiting.py",
        "        pipeline.leaving -= pipeline.given_back\n",
        "        pass\n",
        "tests/unit/recovery/test_replacement_wait.py",
    ),
    Mutant(
        "a step that was being scheduled is in flight without a node",
        "recovery/pipeline.py",
        "        if self.standing is Standing.WAITING:\n",
        "        if False:\n",
    ),
    Mutant(
        "a loss is held against nobody while requests wait for a node",
        "recovery/pipeline.py",
        "self._in_flight.recall(order.epoch, set(), lost, self._forming)",
        "self._in_flight.recall(order.epoch, set(), {}, self._forming)",
        "tests/unit/recovery/test_waiting.py",
    ),
    Mutant(
        "an engine that is introduced twice is taken over twice",
        "recovery/engines.py",
        "    if again and pipeline.formed and engine.claim is None:",
        "    if False:",
    ),
    Mutant(
        "a node that hears nothing is left alone",
        "recovery/detector.py",
        ", self._deaf(listener)]",
        "]",
    ),
    Mutant(
        "a node that hangs in a step is left alone",
        "recovery/detector.py",
        "[self._stuck(member, listener, now), ",
        "[",
    ),
    Mutant(
        "a node that hangs between two steps is left alone",
        "recovery/detector.py",
        "(beat.pipeline is not None and self._is_at_work(",
        "(beat.pipeline is None or self._is_at_work(",
    ),
    Mutant(
        "nodes that hang excuse one another",
        "recovery/detector.py",
        "not beat.is_overdue or beat.running_seconds > mine.running_seconds for beat",
        "beat is not mine for beat",
        "tests/unit/recovery/test_detector.py",
    ),
    Mutant(
        "a process that nobody knows any more is left alone",
        "recovery/cluster.py",
        "            grid.command(KillNode(each.member, each.pids))\n",
        "            pass\n",
        "tests/unit/recovery/test_lost_memory.py",
    ),
    Mutant(
        "nodes are compared by what they compute in all, not by step",
        "recovery/pace.py",
        "means[pace.size].append(pace.seconds / pace.steps)",
        "means[pace.size].append(pace.seconds)",
        "tests/unit/recovery/test_pace.py",
    ),
    Mutant(
        "nodes are compared with other stages",
        "recovery/pace.py",
        "if other != member and each.stage == history.stage",
        "if other != member",
        "tests/unit/recovery/test_pace.py",
    ),
    Mutant(
        "nodes are compared whatever the size of their steps",
        "recovery/pace.py",
        "seconds * 2.0 ** max(0, requests - its_requests, context - its_context)",
        "seconds",
        "tests/unit/recovery/test_pace.py",
    ),
    Mutant(
        "one report is enough to be slow",
        "recovery/pace.py",
        "history.bad < self._enough",
        "history.bad < 1",
        "tests/unit/recovery/test_pace.py",
    ),
    Mutant(
        "a slow node is emptied whatever else is going on",
        "recovery/slowness.py",
        "if slot is None or not _is_at_rest(grid, slot) or not",
        "if slot is None or not slot.living or slot.state is NodeState.DRAINING or not",
        "tests/unit/recovery/test_slowness.py",
    ),
    Mutant(
        "a place is judged again as soon as its fresh node serves",
        "recovery/slowness.py",
        " or not _has_rested(grid, slot):",
        ":",
        "tests/unit/recovery/test_slowness.py",
    ),
    Mutant(
        "a slow node leaves a stage without a node",
        "recovery/slowness.py",
        " or not drain.can_spare(grid, slot):",
        ":",
        "tests/unit/recovery/test_slowness.py",
    ),
)
