// The interpreter must find broken schedules, and say what is broken: each test breaks a right one.
#include "collective/interpreter.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <string>

#include "collective/test_plans.h"

namespace bluefog::collective {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr PlanInput kInput{.size = 4, .count = 11, .chunk = 4};

std::vector<Schedule> RingOfFour(const PlanInput& in = kInput) { return PlanAll(in, *Ring(4)); }

int32_t Find(const Schedule& schedule, StepKind kind, int nth = 0) {
  for (int32_t i = 0; i < static_cast<int32_t>(schedule.steps.size()); ++i) {
    if (schedule.steps[static_cast<size_t>(i)].kind == kind && nth-- == 0) return i;
  }
  ADD_FAILURE() << "no such step";
  return 0;
}

Step& At(Schedule& schedule, StepKind kind, int nth = 0) {
  return schedule.steps[static_cast<size_t>(Find(schedule, kind, nth))];
}

Values InputsFor(const std::vector<Schedule>& schedules) {
  return RandomInputs(static_cast<int>(schedules.size()), schedules[0].input_count);
}

std::string ErrorOf(const std::vector<Schedule>& schedules,
                    const InterpreterOptions& options = {}) {
  return std::string(Interpret(schedules, InputsFor(schedules), options).status().message());
}

TEST(Interpreter, FindsAMessageThatNobodySends) {
  std::vector<Schedule> schedules = RingOfFour();
  std::erase_if(At(schedules[0], StepKind::kPublish).targets,
                [](const Target& target) { return target.peer == 1; });
  EXPECT_THAT(ErrorOf(schedules),
              AllOf(HasSubstr("rank 1, step"), HasSubstr("nobody publishes message"),
                    HasSubstr("from rank 0 to rank 1")));
}

TEST(Interpreter, FindsAMessageThatNobodyReceives) {
  std::vector<Schedule> schedules = RingOfFour();
  At(schedules[0], StepKind::kPublish).targets.push_back({2, 0});
  EXPECT_THAT(ErrorOf(schedules),
              AllOf(HasSubstr("rank 0, step"),
                    HasSubstr("nobody receives message 0 from rank 0 to rank 2")));
}

TEST(Interpreter, FindsAMessageSentTwiceAndOneReceivedTwice) {
  std::vector<Schedule> schedules = RingOfFour();
  At(schedules[0], StepKind::kPublish, 1).targets[0].message = 0;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("a second time"));
  schedules = RingOfFour();
  // Rank 1's second chunk from rank 0.
  for (Step& step : schedules[1].steps) {
    if (step.kind == StepKind::kReceive && step.peer == 0 && step.message == 1) step.message = 0;
  }
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("a second time"));
}

TEST(Interpreter, FindsSwappedMessageNumbers) {
  std::vector<Schedule> schedules = RingOfFour();
  // Equal lengths: only the order tells.
  std::swap(At(schedules[0], StepKind::kPublish, 0).targets,
            At(schedules[0], StepKind::kPublish, 1).targets);
  EXPECT_THAT(ErrorOf(schedules), AllOf(HasSubstr("rank 0, step"), HasSubstr("number 0 is next")));
  schedules = RingOfFour();
  std::swap(At(schedules[0], StepKind::kPublish, 0).targets,
            At(schedules[0], StepKind::kPublish, 2).targets);
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("elements, not"));
}

TEST(Interpreter, FindsAWrongLength) {
  std::vector<Schedule> schedules = RingOfFour();
  At(schedules[2], StepKind::kPublish).range.count = 3;
  EXPECT_THAT(ErrorOf(schedules),
              AllOf(HasSubstr("message 0 from rank 2"), HasSubstr("has 3 elements, not 4")));
  schedules = RingOfFour();
  At(schedules[2], StepKind::kReceive).range.count = 3;
  EXPECT_THAT(ErrorOf(schedules), AllOf(HasSubstr("rank 2"), HasSubstr("a source of 3 elements")));
}

TEST(Interpreter, FindsARangeOutsideItsBuffer) {
  std::vector<Schedule> schedules = RingOfFour();
  At(schedules[3], StepKind::kCombine, 2).range.begin = 9;
  EXPECT_THAT(ErrorOf(schedules), AllOf(HasSubstr("rank 3"), HasSubstr("is outside of")));
  schedules = RingOfFour();
  At(schedules[3], StepKind::kCombine).range.buffer = 1;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("is outside of"));
}

TEST(Interpreter, FindsAViewThatNobodyReads) {
  std::vector<Schedule> schedules = RingOfFour();
  At(schedules[0], StepKind::kCombine).sources.pop_back();
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("no step reads the view"));
  EXPECT_THAT(ErrorOf(schedules, {.allow_unread_views = true}), "");
}

TEST(Interpreter, FindsACycleInsideARank) {
  std::vector<Schedule> schedules = RingOfFour();
  const int32_t combine = Find(schedules[1], StepKind::kCombine);
  At(schedules[1], StepKind::kPublish).after = {combine};
  EXPECT_THAT(ErrorOf(schedules), AllOf(HasSubstr("rank 1"), HasSubstr("which is not earlier")));
}

TEST(Interpreter, NamesTheRanksAndStepsOfADeadlock) {
  // Each waits for the other's message before it sends its own.
  std::vector<Schedule> schedules(2);
  for (int rank = 0; rank < 2; ++rank) {
    Step receive, publish;
    receive.kind = StepKind::kReceive;
    receive.peer = 1 - rank;
    publish.kind = StepKind::kPublish;
    publish.targets = {{1 - rank, 0}};
    publish.after = {0};
    schedules[static_cast<size_t>(rank)].steps = {receive, publish};
  }
  EXPECT_THAT(ErrorOf(schedules), AllOf(HasSubstr("deadlock"), HasSubstr("rank 0, step #0"),
                                        HasSubstr("rank 1, step #1"), HasSubstr("has not arrived"),
                                        HasSubstr("waits for #0")));
}

TEST(Interpreter, FindsThatWaitingForReleasesInPlaceDeadlocks) {
  std::vector<Schedule> schedules = RingOfFour();
  for (Schedule& schedule : schedules) {
    for (int chunk = 0; chunk < 3; ++chunk) {
      At(schedule, StepKind::kCombine, chunk).after = {Find(schedule, StepKind::kPublish, chunk)};
    }
  }
  EXPECT_THAT(ErrorOf(schedules, {.in_place = true}),
              AllOf(HasSubstr("deadlock"), HasSubstr("is not released by rank")));
}

TEST(Interpreter, FindsAnOverwriteOfWhatAPublishStillShows) {
  // Planned for an output of its own, run in place.
  bool found = false;
  for (uint64_t seed = 0; seed < 8 && !found; ++seed) {
    found =
        ErrorOf(RingOfFour(), {.seed = seed, .in_place = true}).find("overwrites what publish") !=
        std::string::npos;
  }
  EXPECT_TRUE(found);
}

TEST(Interpreter, FindsAnElementWrittenTwiceOrNever) {
  std::vector<Schedule> schedules = RingOfFour();
  At(schedules[0], StepKind::kCombine, 1).range.begin = 0;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("twice"));
  schedules = RingOfFour();
  schedules[2].output_count = 12;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("rank 2: element 11 is never written"));
}

TEST(Interpreter, FindsAnElementTheConsumeMisses) {
  auto plan = [](bool fuse) {
    return PlanAll(kInput, [&](const PlanInput& in) {
      return WithPlugin(PlanNeighborAllreduce(in, Ring(4)->neighborhood(in.rank)), {.fuse = fuse});
    });
  };
  std::vector<Schedule> schedules = plan(false);
  At(schedules[0], StepKind::kConsume).range.count = 3;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("rank 0: element 3 is never consumed"));
  schedules = plan(false);
  At(schedules[0], StepKind::kConsume, 1).range.begin = 0;
  At(schedules[0], StepKind::kConsume, 1).after.push_back(Find(schedules[0], StepKind::kCombine));
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("a second time"));
  schedules = plan(true);
  At(schedules[0], StepKind::kConsume).range.count = 3;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("does not fit into group 0"));
  schedules = plan(true);
  At(schedules[0], StepKind::kConsume).group = -1;
  EXPECT_THAT(ErrorOf(schedules), HasSubstr("a tile outside a group"));
}

/// Takes each dependency away, one at a time: in some order of steps that must be an error, or the
/// dependency is not needed or the interpreter blind. `Skip` says which to leave.
template <typename Skip>
void ExpectEveryDependencyCounts(const std::vector<Schedule>& schedules, bool in_place, Skip skip) {
  int tried = 0;
  for (size_t rank = 0; rank < schedules.size(); ++rank) {
    for (size_t i = 0; i < schedules[rank].steps.size(); ++i) {
      const Step& step = schedules[rank].steps[i];
      for (size_t k = 0; k < step.after.size(); ++k) {
        const Step& before = schedules[rank].steps[static_cast<size_t>(step.after[k])];
        if ((step.group >= 0 && step.group == before.group) || skip(step, before)) continue;
        std::vector<Schedule> broken = schedules;
        for (Step& other : broken[rank].steps) {
          // Steps of one group wait together.
          if (&other != &broken[rank].steps[i] && (step.group < 0 || other.group != step.group)) {
            continue;
          }
          std::erase(other.after, step.after[k]);
        }
        ++tried;
        std::string error;
        for (uint64_t seed = 0; seed < 60 && error.empty(); ++seed) {
          error = ErrorOf(broken, {.seed = seed, .in_place = in_place});
        }
        EXPECT_THAT(error, testing::AnyOf(HasSubstr("before it is written"),
                                          HasSubstr("overwrites what publish"),
                                          HasSubstr("measured after a consume")))
            << "rank " << rank << ", step #" << i << " without #" << step.after[k] << " of\n"
            << schedules[rank].ToString();
      }
    }
  }
  EXPECT_GT(tried, 0);
}

TEST(Interpreter, EveryDependencyOfThePlannersIsNeeded) {
  auto none = [](const Step&, const Step&) { return false; };
  PlanInput in{.size = 3, .count = 33, .chunk = 8};
  auto broadcast = [](const PlanInput& rank) { return PlanBroadcast(rank, 1); };
  auto one_shot = [](const PlanInput& rank) { return PlanAllreduce(rank, true, true); };
  auto sharded = [](const PlanInput& rank) { return PlanAllreduce(rank, true, false); };
  // Of three ranks none forwards.
  ExpectEveryDependencyCounts(PlanAll({.size = 4, .count = 9, .chunk = 4}, broadcast), false, none);
  ExpectEveryDependencyCounts(PlanAll(in, sharded), false, none);
  in.in_place = true;
  ExpectEveryDependencyCounts(PlanAll(in, one_shot), true, none);
  // What a copy brings was sent after the owner had read this rank's shard, so waiting for the
  // release as well takes no longer; the interpreter delivers releases at once and cannot miss it.
  ExpectEveryDependencyCounts(PlanAll(in, sharded), true, [](const Step& step, const Step& before) {
    return step.kind == StepKind::kCopy && before.kind == StepKind::kPublish;
  });
  ExpectEveryDependencyCounts(PlanAll(in, *Ring(3)), true, none);
}

TEST(Interpreter, EveryDependencyOfAPluginsScheduleIsNeeded) {
  const PlanInput in{.size = 3, .count = 33, .chunk = 8};
  for (const PluginPlan& plan : {PluginPlan{.payloads = 2}, PluginPlan{.fuse = false},
                                 PluginPlan{.payloads = 2, .measure = true}}) {
    // The order among measures is for equal bits, which the interpreter does not see.
    auto skip = [](const Step& step, const Step& before) {
      return step.kind == StepKind::kMeasure && before.kind == StepKind::kMeasure;
    };
    auto sharded = [&](const PlanInput& rank) {
      return WithPlugin(PlanAllreduce(rank, true, false), plan);
    };
    auto ring = [&](const PlanInput& rank) {
      return WithPlugin(PlanNeighborAllreduce(rank, Ring(3)->neighborhood(rank.rank)), plan);
    };
    ExpectEveryDependencyCounts(PlanAll(in, sharded), false, skip);
    ExpectEveryDependencyCounts(PlanAll(in, ring), false, skip);
  }
}

}  // namespace
}  // namespace bluefog::collective
