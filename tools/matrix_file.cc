// A weight matrix as text: one row a line.
#include "matrix_file.h"

#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <iostream>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace bluefog::tools {
namespace {

// A number or a fraction; false if it is neither.
bool ParseWeight(std::string_view text, double& weight) {
  const auto parse = [](std::string_view part, double& value) {
    const char* const end = part.data() + part.size();
    const auto [stop, error] = std::from_chars(part.data(), end, value);
    return error == std::errc() && stop == end;
  };
  const size_t slash = text.find('/');
  if (slash == std::string_view::npos) return parse(text, weight);
  double divisor = 0.0;
  if (!parse(text.substr(0, slash), weight) || !parse(text.substr(slash + 1), divisor))
    return false;
  weight /= divisor;
  return divisor != 0.0;
}

StatusOr<Topology> Parse(std::istream& in, const std::string& path) {
  std::vector<double> weights;
  size_t columns = 0, rows = 0;
  std::string line;
  for (int number = 1; std::getline(in, line); ++number) {
    constexpr const char* kSeparators = ", \t\r;";
    const std::string_view text = std::string_view(line).substr(0, line.find('#'));
    const size_t before = weights.size();
    for (size_t at = text.find_first_not_of(kSeparators); at != std::string_view::npos;) {
      const size_t end = std::min(text.find_first_of(kSeparators, at), text.size());
      const std::string_view entry = text.substr(at, end - at);
      double weight = 0.0;
      if (!ParseWeight(entry, weight)) {
        return absl::InvalidArgumentError(
            fmt::format("{}:{}: entry {}, \"{}\", is neither a number nor a fraction like 1/3",
                        path, number, weights.size() - before + 1, entry));
      }
      weights.push_back(weight);
      at = text.find_first_not_of(kSeparators, end);
    }
    const size_t found = weights.size() - before;
    if (found == 0) continue;
    if (rows++ == 0) columns = found;
    if (found != columns) {
      return absl::InvalidArgumentError(fmt::format("{}:{}: {} entries where the first row has {}",
                                                    path, number, found, columns));
    }
  }
  if (rows == 0) return absl::InvalidArgumentError(path + ": no weights in it");
  if (rows != columns) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {} rows of {} entries; a weight matrix is square", path, rows, columns));
  }
  StatusOr<Topology> topology = Topology::FromMatrix(static_cast<int>(rows), weights, path);
  if (topology.ok()) return topology;
  return Status(topology.status().code(),
                fmt::format("{}: {}", path, std::string(topology.status().message())));
}

}  // namespace

StatusOr<Topology> ReadMatrix(const std::string& path) {
  if (path == "-") return Parse(std::cin, "standard input");
  std::ifstream file(path);
  // A folder can be opened, but not read.
  if (!file || (file.peek(), file.bad())) {
    return absl::NotFoundError(fmt::format("cannot read {}: {}", path, std::strerror(errno)));
  }
  file.clear();  // An empty file.
  return Parse(file, path);
}

}  // namespace bluefog::tools
