// Ranks that disagree, do not come, leave too early or cannot start: what each of them is told.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "base/clock.h"
#include "base/sanitizer.h"
#include "ranks.h"

namespace bluefog::testing {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr size_t kSmall = 100, kLarge = 500'000;

std::string Text(const Outcome& outcome) { return std::string(outcome.status.message()); }

TEST(Waiting, EndsWithTheTimeoutAndGoesOn) {
  for (const size_t count : {kSmall, kLarge}) {
    const Gate late;
    Job job(2);
    const auto ranks = job.Run([&](Rank& me) -> Status {
      auto comm = JoinRing(me);
      if (!comm.ok()) return comm.status();
      std::vector<float> x(count, static_cast<float>(me.rank));
      if (me.rank == 1) {
        late.Pass();
        return Average(**comm, "x", x);
      }
      auto work = SubmitAverage(**comm, "x", x);
      if (!work.ok()) return work.status();
      const int64_t begin = NowNs();
      const Status first = (*work)->Wait(milliseconds(50));
      const int64_t took_ms = (NowNs() - begin) / 1'000'000;
      late.Open();
      if (!absl::IsDeadlineExceeded(first) || took_ms < 49 || took_ms > 200) {
        return absl::InternalError(first.ToString() + " after " + std::to_string(took_ms) + " ms");
      }
      if (Status s = (*work)->Wait(); !s.ok()) return s;
      const float mean = static_cast<const float*>((*work)->output().data)[count - 1];
      return mean == 0.5f ? absl::OkStatus() : absl::InternalError(std::to_string(mean));
    });
    for (const Outcome& rank : ranks) EXPECT_TRUE(rank.status.ok()) << rank;
  }
}

#if !defined(BLUEFOG_SANITIZED)  // They look at memory through pipes of their own.
/// From now on no more than `left` further descriptors can be opened.
void UseUpDescriptors(int left) {
  rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  const int next = dup(STDERR_FILENO);
  close(next);
  limit.rlim_cur = static_cast<rlim_t>(next + left);
  setrlimit(RLIMIT_NOFILE, &limit);
}

TEST(Shortage, ARankWithoutDescriptorsIsTheOneThatFails) {
  // Fewer than its two connections take. -1: none, and it is the others that connect.
  for (const int left : {-1, 0, 1, 2, 3, 4, 5}) {
    for (const size_t count : {kSmall, kLarge}) {
      SCOPED_TRACE(std::to_string(count) + " elements, " + std::to_string(left) + " left");
      const Gate used_up, told;
      Job job(4);
      const auto ranks = job.Run([&](Rank& me) -> Status {
        auto comm = JoinRing(me);
        if (!comm.ok()) return comm.status();
        std::vector<float> x(count);
        if (me.rank == 1) {
          UseUpDescriptors(std::max(left, 0));
          for (int others = 0; others < 3; ++others) used_up.Open();
          if (left < 0) told.Pass();
        } else {
          used_up.Pass();
        }
        Status status;
        for (int round = 0; status.ok() && round < 10'000; ++round) {
          status = Average(**comm, "x", x);
        }
        if (me.rank == 0) told.Open();
        return status;
      });
      for (const Outcome& rank : ranks) {
        EXPECT_EQ(rank.exit_code, 0) << rank;
        EXPECT_THAT(Text(rank), AllOf(HasSubstr("rank 1 failed"), HasSubstr("ulimit -n"))) << rank;
      }
    }
  }
}
#endif

TEST(Waiting, ARankThatDoesNotComeIsNamed) {
  for (const size_t count : {kSmall, kLarge}) {
    const Gate late;
    Job job(2, [](int, Config& config) {
      config.stall_report_ms = 100;
      config.op_timeout_ms = 400;
    });
    const auto ranks = job.Run([&](Rank& me) -> Status {
      auto comm = JoinRing(me);
      if (!comm.ok()) return comm.status();
      std::vector<float> x(count);
      // Once together: then nothing of the second use wakes a thread that sleeps without a clock.
      if (Status s = Average(**comm, "lonely", x); !s.ok()) return s;
      std::this_thread::sleep_for(milliseconds(50));
      if (me.rank == 1) late.Pass();
      const Status status = Average(**comm, "lonely", x);
      if (me.rank == 0) late.Open();
      // The communicator lives on.
      if (Status s = Average(**comm, "next", x); !s.ok()) return absl::DataLossError(s.ToString());
      return status;
    });
    for (const Outcome& rank : ranks) {
      EXPECT_TRUE(absl::IsDeadlineExceeded(rank.status)) << rank;
      EXPECT_THAT(Text(rank), AllOf(HasSubstr("'lonely'"), HasSubstr("rank 0 waited"),
                                    HasSubstr("for rank 1"), HasSubstr("BLUEFOG_OP_TIMEOUT_MS")));
    }
    EXPECT_THAT(ranks[0].log,
                AllOf(HasSubstr("stall: neighbor_allreduce 'lonely'"), HasSubstr("for rank 1")));
  }
}

struct Difference {
  std::string name, value0, value1;
  std::function<void(int rank, OpSpec&)> spec;
};

std::ostream& operator<<(std::ostream& out, const Difference& d) { return out << d.name; }

class Disagreement : public ::testing::TestWithParam<Difference> {};

TEST_P(Disagreement, NamesBothRanksAndBothValues) {
  for (const size_t count : {kSmall, kLarge}) {
    Job job(2);
    const auto ranks = job.Run([&](Rank& me) -> Status {
      auto comm = JoinRing(me);
      if (!comm.ok()) return comm.status();
      std::vector<double> x(count + 1);
      OpSpec spec;
      spec.name = "w";
      spec.input = TensorView::Of(x.data(), static_cast<int64_t>(count));
      GetParam().spec(me.rank, spec);
      auto work = (*comm)->Submit(spec);
      const Status status = work.ok() ? (*work)->Wait() : work.status();
      // Under any name, and under this one as well.
      std::vector<float> y(count);
      for (const char* name : {"next", "w"}) {
        if (Status s = Average(**comm, name, y); !s.ok()) {
          return absl::DataLossError(s.ToString());
        }
      }
      return status;
    });
    for (const Outcome& rank : ranks) {
      EXPECT_TRUE(absl::IsInvalidArgument(rank.status)) << rank;
      EXPECT_THAT(Text(rank), AllOf(HasSubstr("'w'"), HasSubstr("rank 0"), HasSubstr("rank 1"),
                                    HasSubstr(GetParam().value0), HasSubstr(GetParam().value1)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, Disagreement,
    ::testing::Values(Difference{"Shape", "float64[1", "float64[2, ",
                                 [](int rank, OpSpec& spec) {
                                   if (rank == 0) {
                                     spec.input =
                                         TensorView::Of(static_cast<double*>(spec.input.data), 100);
                                   } else {
                                     TensorView& t = spec.input;
                                     t.ndim = 2;
                                     t.shape = {2, t.count / 2};
                                     t.strides = {t.count / 2, 1};
                                   }
                                 }},
                      Difference{"Dtype", "float64[", "float32[",
                                 [](int rank, OpSpec& spec) {
                                   if (rank == 1) {
                                     spec.input = TensorView::Of(
                                         static_cast<float*>(spec.input.data), spec.input.count);
                                   }
                                 }},
                      Difference{"Operation", "neighbor_allreduce", "allgather",
                                 [](int rank, OpSpec& spec) {
                                   if (rank == 1) spec.op = Op::kAllgather;
                                 }},
                      Difference{"MeanOrSum", "the average", "the sum",
                                 [](int rank, OpSpec& spec) {
                                   spec.op = Op::kAllreduce;
                                   spec.average = rank == 0;
                                 }},
                      Difference{"Root", "0 on rank 0", "1 on rank 1",
                                 [](int rank, OpSpec& spec) {
                                   spec.op = Op::kBroadcast;
                                   spec.root = rank;
                                 }}),
    [](const auto& info) { return info.param.name; });

// A graph whose edges are the same: both ends see their own weights only.
TEST(Disagreement, OnTheWeightsOfATopology) {
  for (const size_t count : {kSmall, kLarge}) {
    for (const bool optimizer : {false, true}) {
      Job job(2);
      const auto ranks = job.Run([&](Rank& me) -> Status {
        auto comm = JoinRing(me);
        if (!comm.ok()) return comm.status();
        const double w = me.rank == 0 ? 0.5 : 0.25;
        auto graph = Topology::FromMatrix(2, {1 - w, w, w, 1 - w});
        if (Status s = (*comm)->SetTopology(TopologySequence(*graph)); !s.ok()) return s;
        std::vector<float> x(count), g(count);
        Status status;
        if (optimizer) {
          DistributedOptimizerOptions options;
          options.plugin = "dsgd";
          options.params = {
              {.name = "w", .count = static_cast<int64_t>(count), .layout = "float32"}};
          auto made = DistributedOptimizer::Create(comm->get(), std::move(options));
          if (!made.ok()) return made.status();
          const ParameterBinding binding{.x = x.data(), .g = g.data()};
          const Hyper hyper{.lr = 0.1};
          status = (*made)->Step({&binding, 1}, {&hyper, 1});
        } else {
          status = Average(**comm, "w", x);
        }
        // A call that brings its weights may have others than its partner's.
        OpSpec own;
        own.name = "own";
        own.input = TensorView::Of(x.data(), static_cast<int64_t>(count));
        if (me.rank == 1) own.weights = MixingWeights{0.9, {{0, 0.1}}, std::nullopt};
        auto work = (*comm)->Submit(own);
        const Status next = work.ok() ? (*work)->Wait() : work.status();
        return next.ok() ? status : absl::DataLossError(next.ToString());
      });
      for (const Outcome& rank : ranks) {
        EXPECT_TRUE(absl::IsInvalidArgument(rank.status)) << rank;
        EXPECT_THAT(Text(rank), AllOf(HasSubstr("'w'"), HasSubstr("weight of the edge"),
                                      HasSubstr("0.5 on rank 0"), HasSubstr("0.25 on rank 1")));
      }
    }
  }
}

// Unnamed operations share a name. Of several under way the right one is described.
TEST(Disagreement, OfOneOfSeveralUnnamedOperationsIsToldAsItIs) {
  constexpr int64_t kCounts[] = {3, 5, 20'000, 7};
  Job job(2);
  const auto ranks = job.Run([&](Rank& me) -> Status {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    std::vector<double> x(40'000);
    std::vector<std::shared_ptr<Work>> works;
    for (const int64_t count : kCounts) {
      OpSpec spec;
      const bool odd = me.rank == 1 && (count == 5 || count == 20'000);
      spec.input = TensorView::Of(x.data(), odd ? 2 * count : count);
      auto work = (*comm)->Submit(spec);
      if (!work.ok()) return absl::DataLossError(work.status().ToString());
      works.push_back(*std::move(work));
    }
    std::string text;
    for (const auto& work : works) text += work->Wait().ToString() + "\n";
    return absl::InvalidArgumentError(text);
  });
  for (const Outcome& rank : ranks) {
    EXPECT_THAT(Text(rank), AllOf(HasSubstr("float64[5]"), HasSubstr("float64[10]"),
                                  HasSubstr("float64[20000]"), HasSubstr("float64[40000]"),
                                  ::testing::Not(HasSubstr("float64[7]")),
                                  ::testing::Not(HasSubstr("float64[3]"))))
        << rank;
  }
}

// What no optimizer can compute with is refused before anything is begun, and can be mended.
TEST(HyperParameters, ThatAreNoNumbersAreRefused) {
  Job job(2);
  const auto ranks = job.Run([&](Rank& me) -> Status {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    std::vector<float> x(100), g(100, 1.0f);
    DistributedOptimizerOptions options;
    options.plugin = "dsgd";
    options.params = {{.name = "w", .count = 100, .layout = "float32[100]"}};
    auto optimizer = DistributedOptimizer::Create(comm->get(), std::move(options));
    if (!optimizer.ok()) return optimizer.status();
    const ParameterBinding binding{.x = x.data(), .g = g.data()};
    std::string text;
    for (const Hyper& hyper : {Hyper{.lr = NAN}, Hyper{.lr = -1.0}, Hyper{.momentum = INFINITY},
                               Hyper{.weight_decay = NAN}, Hyper{.lr = 0.5}}) {
      text += (*optimizer)->Step({&binding, 1}, {&hyper, 1}).ToString() + "\n";
    }
    return x[99] == -0.5f ? absl::InvalidArgumentError(text)
                          : absl::InternalError(std::to_string(x[99]));
  });
  for (size_t r = 0; r < ranks.size(); ++r) {
    const Outcome& rank = ranks[r];
    EXPECT_THAT(Text(rank),
                AllOf(HasSubstr("rank " + std::to_string(r) + ": dsgd, step 0, group 0: lr is nan"),
                      HasSubstr("lr is -1"), HasSubstr("momentum is inf"),
                      HasSubstr("weight_decay is nan"), HasSubstr("\nOK\n")))
        << rank;
  }
}

TEST(Leaving, AShutdownThatWaitsCanBeInterrupted) {
  const Gate sent, over;
  Job job(2);
  const auto ranks = job.Run([&](Rank& me) -> Status {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    std::vector<float> x(100);
    if (Status s = Average(**comm, "connected", x); !s.ok()) return s;
    if (me.rank == 1) {
      over.Pass();  // Does not take what was sent.
      return absl::OkStatus();
    }
    OpSpec spec;
    spec.op = Op::kBroadcast;
    spec.name = "nobody takes it";
    spec.input = TensorView::Of(x.data(), 100);
    auto work = (*comm)->Submit(std::move(spec));
    if (!work.ok()) return work.status();
    int asked = 0;
    const int64_t begin = NowNs();
    (*comm)->Shutdown([&asked] { return ++asked == 2; });
    const int64_t took_ms = (NowNs() - begin) / 1'000'000;
    over.Open();
    return asked == 2 && took_ms < 2'000
               ? absl::OkStatus()
               : absl::InternalError(std::to_string(asked) + " questions in " +
                                     std::to_string(took_ms) + " ms");
  });
  for (const Outcome& rank : ranks) EXPECT_EQ(rank.exit_code, 0) << rank;
  EXPECT_TRUE(ranks[0].status.ok()) << ranks[0];
}

// No step says which graph it uses, so the first ranks that miss a partner find out; the others
// hear of it, also those that were through with that step and do not send to them.
TEST(Disagreement, OnTheGraphOfAnOptimizerIsToldToAllRanks) {
  constexpr int kRanks = 5;
  for (const RingStyle style : {RingStyle::kBidirectional, RingStyle::kRight}) {
    Job job(kRanks, [](int, Config& config) { config.stall_report_ms = 300; });
    const auto ranks = job.Run([&](Rank& me) -> Status {
      auto comm = JoinRing(me);
      if (!comm.ok()) return comm.status();
      std::vector<float> x(40'000), g(40'000);
      DistributedOptimizerOptions options;
      options.plugin = "dsgd";
      options.params = {{.name = "w", .count = 40'000, .layout = "float32[40000]"}};
      options.topology =
          std::make_shared<TopologySequence>(me.rank == 1 ? *Star(kRanks) : *Ring(kRanks, style));
      auto optimizer = DistributedOptimizer::Create(comm->get(), std::move(options));
      if (!optimizer.ok()) return optimizer.status();
      const ParameterBinding binding{.x = x.data(), .g = g.data()};
      const Hyper hyper{.lr = 0.1};
      const int64_t begin = NowNs();
      Status status;
      while (status.ok()) status = (*optimizer)->Step({&binding, 1}, {&hyper, 1});
      const double took = static_cast<double>(NowNs() - begin) * 1e-9;
      // Nobody hears of it because a rank has ended; and plain operations go on.
      if (Status s = Average(**comm, "next", x); !s.ok()) return absl::DataLossError(s.ToString());
      return took < 5.0 ? status : absl::InternalError("took " + std::to_string(took) + " s");
    });
    for (const Outcome& rank : ranks) {
      EXPECT_TRUE(absl::IsInvalidArgument(rank.status)) << rank;
      EXPECT_THAT(Text(rank),
                  AllOf(HasSubstr("dsgd, parameter 'w', step "), HasSubstr("rank 1"),
                        AnyOf(HasSubstr("must name each other"), HasSubstr("weight of the edge"))));
    }
  }
}

TEST(Leaving, WithAnOperationOfTheNeighbourOutstanding) {
  for (const int leaver : {0, 1}) {
    for (const size_t count : {kSmall, kLarge}) {
      const Gate submitted;
      Job job(2);
      const auto ranks = job.Run([&](Rank& me) -> Status {
        auto comm = JoinRing(me);
        if (!comm.ok()) return comm.status();
        std::vector<float> x(count);
        if (Status s = Average(**comm, "both", x); !s.ok())
          return absl::DataLossError(s.ToString());
        if (me.rank == leaver) {
          submitted.Pass();
          return absl::OkStatus();
        }
        auto work = SubmitAverage(**comm, "alone", x);
        submitted.Open();
        return work.ok() ? (*work)->Wait() : work.status();
      });
      EXPECT_TRUE(ranks[leaver].status.ok()) << ranks[leaver];
      EXPECT_EQ(ranks[leaver].exit_code, 0) << ranks[leaver];
      const Outcome& left = ranks[1 - leaver];
      EXPECT_TRUE(absl::IsUnavailable(left.status)) << left;
      EXPECT_THAT(Text(left), HasSubstr("rank " + std::to_string(leaver) + " has left"));
    }
  }
}

TEST(Starting, PortTaken) {
  Job job(2, [](int, Config& config) { config.join_timeout_ms = 1'000; });
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(job.port()));
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 8), 0);
  const auto ranks = job.Run([](Rank& me) { return JoinRing(me).status(); });
  close(fd);
  for (const Outcome& rank : ranks) {
    EXPECT_FALSE(rank.status.ok());
    EXPECT_EQ(rank.exit_code, 0) << rank;
    EXPECT_THAT(Text(rank), HasSubstr("127.0.0.1:" + std::to_string(job.port()))) << rank;
  }
  EXPECT_THAT(Text(ranks[0]), AnyOf(HasSubstr("in use"), HasSubstr("taken"))) << ranks[0];
}

// What a data loader's worker is: a copy of a rank that must not take part.
TEST(Forking, TheChildIsRefusedAndItsExitDoesNothing) {
  const std::string timeline = ::testing::TempDir() + "fork" + std::to_string(getpid()) + ".";
  Job job(2, [&](int, Config& config) { config.timeline = timeline; });
  const auto ranks = job.Run([](Rank& me) -> Status {
    static std::unique_ptr<Communicator> comm;  // Its destructor runs when the child exits.
    auto made = JoinRing(me);
    if (!made.ok()) return made.status();
    comm = *std::move(made);
    std::vector<float> x(kLarge), y(kLarge);
    if (Status s = Average(*comm, "before", x); !s.ok()) return s;
    auto pending = SubmitAverage(*comm, "across", y);
    if (!pending.ok()) return pending.status();
    const pid_t child = fork();
    if (child == 0) {
      ExpectLeaks();
      auto work = SubmitAverage(*comm, "child", x);
      if (!absl::IsFailedPrecondition(work.status())) std::exit(1);
      if (work.status().message().find("forked") == std::string::npos) std::exit(2);
      // What was under way at the fork may have ended just before it.
      const Status waited = (*pending)->Wait();
      if (!waited.ok() && !absl::IsFailedPrecondition(waited)) std::exit(3);
      std::exit(0);
    }
    int wait_status = 0;
    waitpid(child, &wait_status, 0);
    if (wait_status != 0) {
      return absl::InternalError("the child ended with " + std::to_string(wait_status));
    }
    if (Status s = (*pending)->Wait(); !s.ok()) return s;
    return Average(*comm, "after", x);
  });
  for (size_t r = 0; r < ranks.size(); ++r) {
    EXPECT_TRUE(ranks[r].status.ok()) << ranks[r];
    EXPECT_EQ(ranks[r].exit_code, 0) << ranks[r];
    // The parent's timeline is its own, too.
    const std::string file = timeline + std::to_string(r) + ".json";
    std::stringstream text;
    text << std::ifstream(file).rdbuf();
    EXPECT_THAT(text.str(), HasSubstr("after")) << ranks[r];
    std::remove(file.c_str());
  }
}

}  // namespace
}  // namespace bluefog::testing
