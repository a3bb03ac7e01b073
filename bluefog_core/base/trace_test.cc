#include "base/trace.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/trace_file.h"
#include "base/trace_names.h"
#include "base/trace_ring.h"

namespace bluefog {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

class TraceTest : public ::testing::Test {
 protected:
  TraceTest() {
    std::string name = ::testing::TempDir() + "bluefog_trace_XXXXXX";
    dir_ = mkdtemp(name.data());
  }
  ~TraceTest() override { fs::remove_all(dir_); }
  std::string prefix() const { return dir_ + "/t_"; }

  static json Parse(const std::string& path) {
    std::ifstream in(path);
    json array = json::parse(in, nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(array.is_array()) << path;
    return array;
  }
  static std::vector<json> Select(const json& array, const std::string& key, const json& value) {
    std::vector<json> found;
    for (const json& event : array) {
      if (event.contains(key) && event[key] == value) found.push_back(event);
    }
    return found;
  }

  std::string dir_;
};

TEST_F(TraceTest, OffDoesNothing) {
  Trace trace;
  trace.Span(TraceTrack::kEngine, "combine", "x", 1, 2);
  trace.FlowBegin(TraceTrack::kEngine, 1, 1);
  EXPECT_FALSE(trace.on());
  trace.Stop();
  EXPECT_TRUE(fs::is_empty(dir_));
}

TEST_F(TraceTest, EventsAreWrittenAsChromeShowsThem) {
  Trace trace;
  ASSERT_TRUE(trace.Start(prefix(), 3).ok());
  trace.Span(TraceTrack::kEngine, "combine", "layer.0", 1'234'567, 1'236'570, {"element", 2});
  trace.Span(TraceTrack::kCaller, "wait", "layer.0", 5'000, 5'000);
  trace.Instant(TraceTrack::kCaller, "gradient ready", "layer.1", 7'001);
  trace.Async("optimizer", "bucket0", 0xfedcba9876543211, 1'000, 9'500, {"step", 0});
  trace.FlowBegin(TraceTrack::kNetwork, 0xfedcba9876543210, 8'000);
  trace.FlowEnd(TraceTrack::kEngine, 0xfedcba9876543210, 9'000);
  trace.Stop();

  const json events = Parse(prefix() + "3.json");
  for (const json& event : events) EXPECT_EQ(event["pid"], 3);
  const auto combine = Select(events, "name", "combine");
  ASSERT_EQ(combine.size(), 1u);
  EXPECT_EQ(combine[0], json::parse(R"({"name":"combine","ph":"X","ts":1234.567,"dur":2.003,"pid":3,
      "tid":2,"args":{"operation":"layer.0","element":2}})"));
  EXPECT_EQ(Select(events, "name", "wait")[0]["dur"], 0.0);
  EXPECT_EQ(Select(events, "name", "wait")[0]["args"], json::parse(R"({"operation":"layer.0"})"));
  const json instant = Select(events, "ph", "i")[0];
  EXPECT_EQ(instant["ts"], 7.001);
  EXPECT_EQ(instant["tid"], 1);
  EXPECT_EQ(instant["s"], "t");
  const auto operation = Select(events, "name", "optimizer");
  ASSERT_EQ(operation.size(), 2u);
  EXPECT_EQ(operation[0]["ph"], "b");
  EXPECT_EQ(operation[0]["ts"], 1.0);
  EXPECT_EQ(operation[0]["args"]["step"], 0);
  EXPECT_EQ(operation[1]["ph"], "e");
  EXPECT_EQ(operation[1]["ts"], 9.5);
  for (const json& end : operation) EXPECT_EQ(end["id"], "0xfedcba9876543211");
  const json begin = Select(events, "ph", "s")[0], end = Select(events, "ph", "f")[0];
  EXPECT_EQ(begin["id"], "0xfedcba9876543210");
  for (const char* key : {"id", "name", "cat"}) EXPECT_EQ(begin[key], end[key]) << key;
  EXPECT_EQ(end["bp"], "e");

  EXPECT_EQ(Select(events, "name", "process_name")[0]["args"]["name"], "rank 3");
  std::set<std::string> rows;
  for (const json& e : Select(events, "name", "thread_name")) rows.insert(e["args"]["name"]);
  EXPECT_EQ(rows, (std::set<std::string>{"caller", "engine", "network"}));
  EXPECT_EQ(events.back()["name"], "bluefog_events_dropped");
  EXPECT_EQ(events.back()["args"]["count"], 0);
}

TEST_F(TraceTest, AnyOperationNameGivesValidJson) {
  Trace trace;
  ASSERT_TRUE(trace.Start(prefix(), 0).ok());
  const std::string quoted = "a\"b\\c\n\t\x01 \xc3\xbc";  // ends with ü
  trace.Instant(TraceTrack::kEngine, "x", quoted, 1);
  trace.Instant(TraceTrack::kEngine, "x", "bad \xff\xc3.\xed\xa0\x80", 2);
  trace.Instant(TraceTrack::kEngine, "x", std::string(100'000, '\n'), 3);
  trace.Stop();
  const auto found = Select(Parse(prefix() + "0.json"), "name", "x");
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0]["args"]["operation"], quoted);
  EXPECT_EQ(found[1]["args"]["operation"], "bad ??.???");
  EXPECT_EQ(found[2]["args"]["operation"], std::string(TraceNames::kMaxLength, '\n'));
}

TEST_F(TraceTest, AnEventIsInTheFileSoonWithoutStop) {
  Trace trace;
  ASSERT_TRUE(trace.Start(prefix(), 0).ok());
  for (int round = 0; round < 3; ++round) {  // Each wakes the writer anew.
    trace.Instant(TraceTrack::kEngine, "mark", "x", round);
    json events;
    do {  // The test's time limit is the assertion.
      std::ifstream in(prefix() + "0.json");
      events = json::parse(in, nullptr, /*allow_exceptions=*/false);
    } while (static_cast<int>(Select(events, "name", "mark").size()) <= round);
  }
}

TEST_F(TraceTest, TheFileIsValidWheneverItIsRead) {
  Trace trace;
  ASSERT_TRUE(trace.Start(prefix(), 0).ok());
  constexpr int kThreads = 2, kBursts = 500, kBurst = 10;
  std::atomic<int> writing{kThreads};
  std::vector<std::thread> writers;
  for (int t = 0; t < kThreads; ++t) {
    writers.emplace_back([&, t] {
      const std::string operation(40 + 10 * t, 'a');
      const int64_t begin = NowNs();
      for (int64_t burst = 0; burst < kBursts; ++burst) {
        while (NowNs() < begin + burst * 2'000'000) std::this_thread::yield();
        for (int i = 0; i < kBurst; ++i) {
          trace.Span(TraceTrack::kEngine, "produce", operation, burst, burst + 1, {"element", i});
        }
      }
      --writing;
    });
  }
  // Page by page, so that many writes fall between the first read of a file and the last.
  const auto read_slowly = [&] {
    const int fd = open((prefix() + "0.json").c_str(), O_RDONLY);
    std::string text;
    char page[4096];
    for (ssize_t n; (n = read(fd, page, sizeof(page))) > 0;) {
      text.append(page, static_cast<size_t>(n));
      std::this_thread::yield();
    }
    close(fd);
    return text;
  };
  int reads = 0, invalid = 0, invalid_twice = 0;
  for (; writing > 0; ++reads) {
    if (json::accept(read_slowly())) continue;
    // The kernel may copy a page out while an event is copied into it, once in ten thousand reads.
    ++invalid;
    invalid_twice += !json::accept(read_slowly());
  }
  for (auto& writer : writers) writer.join();
  EXPECT_EQ(invalid_twice, 0);
  EXPECT_LE(invalid, 1 + reads / 100);
  trace.Stop();
  EXPECT_GT(reads, 1);
  const json events = Parse(prefix() + "0.json");
  EXPECT_EQ(Select(events, "name", "produce").size() + events.back()["args"]["count"].get<size_t>(),
            size_t{kThreads} * kBursts * kBurst);
}

TEST_F(TraceTest, NothingIsLostSilently) {
  Trace trace;
  ASSERT_TRUE(trace.Start(prefix(), 0).ok());
  constexpr int kThreads = 3, kEvents = 30'000;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEvents; ++i) {
        trace.Instant(TraceTrack::kEngine, "tick", "op" + std::to_string(i % 100), i,
                      {"thread", t});
      }
    });
  }
  for (auto& thread : threads) thread.join();
  trace.Stop();
  const json events = Parse(prefix() + "0.json");
  const int64_t dropped = events.back()["args"]["count"];
  EXPECT_EQ(static_cast<int64_t>(Select(events, "name", "tick").size()) + dropped,
            int64_t{kThreads} * kEvents);
  // The file holds no blanks for events that never came.
  EXPECT_LT(fs::file_size(prefix() + "0.json"), 200u * events.size());
}

TEST_F(TraceTest, RemovingTheFileBreaksNothing) {
  Trace trace;
  ASSERT_TRUE(trace.Start(prefix(), 0).ok());
  fs::remove_all(dir_);
  for (int i = 0; i < 5000; ++i) trace.Span(TraceTrack::kEngine, "combine", "x", i, i + 1);
  ::testing::internal::CaptureStderr();
  trace.Stop();
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("was removed"));
  EXPECT_FALSE(fs::exists(dir_));
}

TEST_F(TraceTest, StartsAgainAfterStopAndNotTwice) {
  Trace trace;
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(trace.Start(prefix(), round).ok());
    EXPECT_EQ(trace.Start(prefix(), 9).code(), absl::StatusCode::kFailedPrecondition);
    trace.Instant(TraceTrack::kEngine, "mark", "x", round);
    trace.Stop();
    trace.Stop();
    trace.Instant(TraceTrack::kEngine, "mark", "late", round);
    EXPECT_EQ(Select(Parse(prefix() + std::to_string(round) + ".json"), "name", "mark").size(), 1u);
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_), {}), 3);  // No temporary files.
}

TEST_F(TraceTest, RecordingBesideStartAndStopIsSafe) {
  Trace trace;
  std::atomic<bool> stop{false};
  std::thread recorder([&] {
    for (int64_t i = 0; !stop; ++i) trace.Span(TraceTrack::kNetwork, "receive", "x", i, i + 1);
  });
  for (int round = 0; round < 20; ++round) {
    ASSERT_TRUE(trace.Start(prefix(), 0).ok());
    trace.Stop();
    Parse(prefix() + "0.json");
  }
  stop = true;
  recorder.join();
}

TEST_F(TraceTest, AFolderThatDoesNotExistIsAnErrorThatNamesIt) {
  Trace trace;
  const Status s = trace.Start(dir_ + "/no/such_", 0);
  EXPECT_EQ(s.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(s.message()), HasSubstr(dir_ + "/no/such_0.json"));
  EXPECT_THAT(std::string(s.message()), HasSubstr("BLUEFOG_TIMELINE"));
  EXPECT_FALSE(trace.on());
  EXPECT_TRUE(trace.Start(prefix(), 0).ok());  // It can be mended.
}

TEST_F(TraceTest, AReaderOvertakenByWritesSeesAWholeFile) {
  TraceFile file;
  ASSERT_TRUE(file.Open(dir_ + "/f.json", "0").ok());
  const std::string record = "{\"pad\":\"" + std::string(777, 'x') + "\"}";
  size_t records_end = 0;
  for (int round = 0; round < 150; ++round) {  // Beyond the first replacement of the file.
    // Up to a page border about which the next records come to lie, and the rest after them.
    const int fd = open((dir_ + "/f.json").c_str(), O_RDONLY);
    std::string text((records_end / TraceFile::kPage + round % 2) * TraceFile::kPage, '\0');
    text.resize(read(fd, text.data(), text.size()));
    for (int i = 0; i <= round % 3; ++i) ASSERT_TRUE(file.Add(record));
    ASSERT_TRUE(file.Flush().ok());
    char page[TraceFile::kPage];
    for (ssize_t n; (n = read(fd, page, sizeof(page))) > 0;) text.append(page, n);
    close(fd);
    ASSERT_TRUE(json::accept(text)) << "round " << round;
    if (text.rfind('}') != std::string::npos) records_end = text.rfind('}');
  }
}

TEST_F(TraceTest, FileRefusesARecordLongerThanAPageAndKeepsTheRest) {
  TraceFile file;
  ASSERT_TRUE(file.Open(dir_ + "/f.json", "0").ok());
  EXPECT_FALSE(file.Add('"' + std::string(TraceFile::kPage, 'x') + '"'));
  for (int i = 1; i < 40'000; ++i) ASSERT_TRUE(file.Add(std::to_string(i)));
  ASSERT_TRUE(file.Close().ok());
  const json array = Parse(dir_ + "/f.json");
  ASSERT_EQ(array.size(), 40'000u);
  for (int i = 0; i < 40'000; ++i) ASSERT_EQ(array[i], i);
}

TEST(TraceNames, TheSameNameGivesTheSameStringAndTooManyAreRefusedGently) {
  TraceNames names;
  const std::string* first = names.Intern("x");
  EXPECT_EQ(names.Intern(std::string("x")), first);
  EXPECT_NE(names.Intern("y"), first);
  for (int i = 0; i < 20'000; ++i) names.Intern("n" + std::to_string(i));
  EXPECT_EQ(*names.Intern("one more"), "(more names)");
  EXPECT_EQ(names.Intern("x"), first);
}

TEST(TraceRing, KeepsOrderAndRefusesWhenFull) {
  TraceRing<int, 4> ring;
  int next = 0, value = -1, expected = 0;
  for (int lap = 0; lap < 5; ++lap) {
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(ring.Push(next++));
    EXPECT_FALSE(ring.Push(99));
    for (int i = 0; i < 4; ++i) {
      ASSERT_TRUE(ring.Pop(&value));
      EXPECT_EQ(value, expected++);
    }
    EXPECT_FALSE(ring.Pop(&value));
    EXPECT_TRUE(ring.Empty());
  }
}

}  // namespace
}  // namespace bluefog
