// The list of failpoints, the parser of their specification, and what happens when one is reached.
#include "base/failpoint.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <string_view>
#include <thread>

#include "base/log.h"
#include "base/mutex.h"

namespace bluefog {
namespace {

constexpr std::string_view kNames[] = {
    "engine.submit",
    "engine.start_op",
    "engine.before_produce",
    "engine.before_publish",
    "engine.after_publish",
    "engine.after_receive",
    "engine.before_combine",
    "engine.before_consume",
    "engine.op_done",
    "shm.connect",
    "shm.accept",
    "control.join",
    "control.heartbeat",
};

enum class Action { kKill, kStop, kError, kSleep };

struct Failpoint {
  std::string_view name;  // One of kNames.
  Action action = Action::kError;
  int64_t sleep_ms = 0;
  int64_t fire_at = 1;
  int64_t reached = 0;
};

Mutex mu;
std::vector<Failpoint>& Armed() REQUIRES(mu) {
  static auto& armed = *new std::vector<Failpoint>;
  return armed;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

bool ParseCount(std::string_view text, int64_t min, int64_t* out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  return error == std::errc() && end == text.data() + text.size() && *out >= min;
}

Status Malformed(std::string_view part, const std::string& why) {
  return absl::InvalidArgumentError("failpoint '" + std::string(part) +
                                    "' (BLUEFOG_FAILPOINTS): " + why);
}

StatusOr<Failpoint> Parse(std::string_view part) {
  const size_t equals = part.find('=');
  if (equals == std::string_view::npos) return Malformed(part, "expected name=action[@n]");
  Failpoint point;
  const auto name = Trim(part.substr(0, equals));
  const auto* known = std::find(std::begin(kNames), std::end(kNames), name);
  if (known == std::end(kNames)) {
    std::string list;
    for (const auto n : kNames) list += " " + std::string(n);
    return Malformed(part, "there is no failpoint of this name; there are" + list);
  }
  point.name = *known;

  auto action = Trim(part.substr(equals + 1));
  if (const size_t at = action.find('@'); at != std::string_view::npos) {
    if (!ParseCount(Trim(action.substr(at + 1)), 1, &point.fire_at)) {
      return Malformed(part, "after @ expected the count at which it fires, 1 or more");
    }
    action = Trim(action.substr(0, at));
  }
  constexpr std::string_view kSleep = "sleep:";
  if (action == "kill") {
    point.action = Action::kKill;
  } else if (action == "stop") {
    point.action = Action::kStop;
  } else if (action == "error") {
    point.action = Action::kError;
  } else if (action.substr(0, kSleep.size()) == kSleep) {
    point.action = Action::kSleep;
    if (!ParseCount(action.substr(kSleep.size()), 0, &point.sleep_ms)) {
      return Malformed(part, "after sleep: expected milliseconds");
    }
  } else {
    return Malformed(part, "expected the action kill, stop, error or sleep:MS");
  }
  return point;
}

}  // namespace

std::atomic<bool> failpoints_on{false};

Status SetFailpoints(const std::string& spec) {
  std::vector<Failpoint> points;
  std::string_view rest = spec;
  while (!rest.empty()) {
    const size_t end = std::min(rest.find(';'), rest.size());
    const auto part = Trim(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (part.empty()) continue;
    auto point = Parse(part);
    if (!point.ok()) return point.status();
    points.push_back(*point);
  }
  MutexLock lock(mu);
  Armed() = std::move(points);
  failpoints_on.store(!Armed().empty(), std::memory_order_relaxed);
  return absl::OkStatus();
}

std::vector<std::string> FailpointNames() { return {std::begin(kNames), std::end(kNames)}; }

bool FailpointHitSlow(const char* name) {
  if (std::find(std::begin(kNames), std::end(kNames), name) == std::end(kNames)) {
    BLUEFOG_LOG(kError) << "failpoint '" << name << "' is missing from the list in failpoint.cc";
  }
  bool fail = false;
  int64_t sleep_ms = 0;
  {
    MutexLock lock(mu);
    for (Failpoint& point : Armed()) {
      if (point.name != name || ++point.reached != point.fire_at) continue;
      switch (point.action) {
        case Action::kKill:
          kill(getpid(), SIGKILL);
          break;
        case Action::kStop:
          kill(getpid(), SIGSTOP);
          break;
        case Action::kError:
          fail = true;
          break;
        case Action::kSleep:
          sleep_ms += point.sleep_ms;
          break;
      }
    }
  }
  // Outside the lock: the other threads' failpoints stay reachable meanwhile.
  if (sleep_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(sleep_ms));
  return fail;
}

}  // namespace bluefog
