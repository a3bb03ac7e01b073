#include "collective/schedule.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <utility>

#include "collective/builder.h"

namespace bluefog::collective {
namespace {

const char* NameOf(Role role) {
  switch (role) {
    case Role::kInput:
      return "input";
    case Role::kOutput:
      return "output";
    case Role::kScratch:
      return "scratch";
    case Role::kCoded:
      return "coded";
    case Role::kTile:
      return "tile";
  }
  return "?";
}

void Print(const Step& step, std::ostream& out) {
  out << NameOf(step.kind);
  if (step.kind == StepKind::kReceive) {
    out << " message " << step.message << " of rank " << step.peer << ", " << step.range.count;
    if (step.range.role == Role::kCoded) out << " coded";
  } else {
    out << " " << ToString(step.range);
  }
  for (const Target& target : step.targets) {
    out << " -> rank " << target.peer << " message " << target.message;
    if (target.weight != 1.0) out << " weight " << target.weight;
  }
  const char* separator = " = ";
  for (const Source& source : step.sources) {
    out << std::exchange(separator, " + ");
    if (source.weight != 1.0) out << source.weight << "*";
    if (source.receive >= 0) {
      out << "#" << source.receive;
    } else {
      out << ToString(source.local);
    }
  }
  if (step.divisor > 0) out << " / " << step.divisor;
  separator = " after #";
  for (int32_t index : step.after) out << std::exchange(separator, " #") << index;
  if (step.group >= 0) out << " group " << step.group;
}

}  // namespace

const char* NameOf(StepKind kind) {
  switch (kind) {
    case StepKind::kProduce:
      return "produce";
    case StepKind::kPublish:
      return "publish";
    case StepKind::kReceive:
      return "receive";
    case StepKind::kCombine:
      return "combine";
    case StepKind::kMeasure:
      return "measure";
    case StepKind::kConsume:
      return "consume";
    case StepKind::kCopy:
      return "copy";
    case StepKind::kNative:
      return "native";
  }
  return "?";
}

std::string ToString(const Range& range) {
  return std::string(NameOf(range.role)) + "[" + std::to_string(range.buffer) + "] " +
         std::to_string(range.begin) + "+" + std::to_string(range.count);
}

std::string ToString(const Step& step) {
  std::ostringstream out;
  Print(step, out);
  return out.str();
}

std::vector<int> Schedule::sources() const {
  std::set<int> ranks;
  for (const Step& step : steps) {
    if (step.kind == StepKind::kReceive) ranks.insert(step.peer);
  }
  return {ranks.begin(), ranks.end()};
}

std::vector<int> Schedule::destinations() const {
  std::set<int> ranks;
  for (const Step& step : steps) {
    for (const Target& target : step.targets) ranks.insert(target.peer);
  }
  return {ranks.begin(), ranks.end()};
}

std::string Schedule::ToString() const {
  std::ostringstream out;
  for (size_t i = 0; i < steps.size(); ++i) {
    out << "#" << i << " ";
    Print(steps[i], out);
    out << '\n';
  }
  return out.str();
}

std::vector<Piece> Cut(int64_t begin, int64_t count, int64_t chunk) {
  if (count == 0) return {{begin, 0}};
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>((count + chunk - 1) / chunk));
  for (int64_t at = 0; at < count; at += chunk) {
    pieces.push_back({begin + at, std::min(chunk, count - at)});
  }
  return pieces;
}

int32_t Builder::Append(Step step) {
  schedule_.steps.push_back(std::move(step));
  return static_cast<int32_t>(schedule_.steps.size()) - 1;
}

int32_t Builder::Publish(Range range, std::vector<Target> targets, std::vector<int32_t> after) {
  return Append({.kind = StepKind::kPublish,
                 .range = range,
                 .targets = std::move(targets),
                 .after = std::move(after)});
}

int32_t Builder::Send(Range range, const std::vector<Edge>& to, std::vector<int32_t> after) {
  std::vector<Target> targets;
  for (const Edge& edge : to) targets.push_back({edge.rank, next_to_[edge.rank]++, edge.weight});
  return Publish(range, std::move(targets), std::move(after));
}

int32_t Builder::Receive(int peer, int32_t message, int64_t count, Role role) {
  return Append({.kind = StepKind::kReceive,
                 .range = {.role = role, .count = count},
                 .peer = peer,
                 .message = message});
}

int32_t Builder::Copy(Range range, Source source, std::vector<int32_t> after) {
  return Append(
      {.kind = StepKind::kCopy, .range = range, .sources = {source}, .after = std::move(after)});
}

int32_t Builder::Combine(Range range, std::vector<Source> sources, double divisor,
                         std::vector<int32_t> after) {
  return Append({.kind = StepKind::kCombine,
                 .range = range,
                 .sources = std::move(sources),
                 .divisor = divisor,
                 .after = std::move(after)});
}

}  // namespace bluefog::collective
