#include "output.h"

#include <limits.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

namespace bluefog::tools {
namespace {

constexpr size_t kMaxLine = 64 << 10;  // A longer line comes in pieces.

}  // namespace

void Output::Add(int fd, std::string text) {
  if (text.empty()) return;
  bytes_ += text.size();
  pieces_.push_back({fd, std::move(text)});
}

bool Output::full() const { return bytes_ >= kMaxLine; }

bool Output::Flush() {
  bool all_read = true;
  while (!pieces_.empty()) {
    const auto& [fd, text] = pieces_.front();
    pollfd ready = {fd, POLLOUT, 0};
    if (poll(&ready, 1, 0) == 0) break;
    // A pipe that has room at all has it for so much.
    const size_t most = std::min<size_t>(text.size() - done_, PIPE_BUF);
    const ssize_t n = write(fd, text.data() + done_, most);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n < 0) {
      all_read = false;
      const int gone = fd;
      std::erase_if(pieces_, [gone](const Piece& piece) { return piece.fd == gone; });
      bytes_ = done_ = 0;
      for (const Piece& piece : pieces_) bytes_ += piece.text.size();
      continue;
    }
    done_ += static_cast<size_t>(n);
    if (done_ < text.size()) continue;
    bytes_ -= text.size();
    done_ = 0;
    pieces_.pop_front();
  }
  return all_read;
}

void Stream::Forward(const LineSink& sink, bool at_end) {
  if (tag.empty()) return sink.add(to, std::exchange(pending, ""));
  std::string out;
  size_t begin = 0;
  for (size_t i = 0; i < pending.size(); ++i) {
    // A lone carriage return ends a line, too: progress bars.
    const bool end = pending[i] == '\n' ||
                     (pending[i] == '\r' && i + 1 < pending.size() && pending[i + 1] != '\n');
    if (!end) continue;
    out += tag + pending.substr(begin, i + 1 - begin);
    begin = i + 1;
  }
  pending.erase(0, begin);
  if (!pending.empty() && (at_end || pending.size() >= kMaxLine)) {
    out += tag + pending + "\n";
    pending.clear();
  }
  sink.add(to, std::move(out));
}

void Stream::Drain(const LineSink& sink) {
  std::array<char, 64 << 10> bytes;
  while (from >= 0 && !sink.full()) {
    const ssize_t n = read(from, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return Forward(sink, false);
    if (n <= 0) {
      close(from);
      from = -1;
      return Forward(sink, true);
    }
    pending.append(bytes.data(), static_cast<size_t>(n));
    Forward(sink, false);
  }
}

}  // namespace bluefog::tools
