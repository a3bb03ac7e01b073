// Streams of the launcher and its agents: text on its way out, none of whose writes waits, and the
// lines that come out of a pipe.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <string>

namespace bluefog::tools {

/// What waits to be written, in order and piece by piece. No write waits: a pager may not read for
/// hours, and signals want an answer meanwhile.
class Output {
 public:
  void Add(int fd, std::string text);
  bool empty() const { return pieces_.empty(); }
  /// Nothing more should be added.
  bool full() const;
  /// Bytes.
  size_t waiting() const { return bytes_ - done_; }
  /// Where the first piece goes.
  int fd() const { return pieces_.front().fd; }
  /// Writes what goes at once. False if a reader is gone; what is for it is dropped.
  bool Flush();

 private:
  struct Piece {
    int fd;
    std::string text;
  };
  std::deque<Piece> pieces_;
  size_t bytes_ = 0, done_ = 0;  // Of all; of the first, written.
};

/// Takes the lines of streams.
struct LineSink {
  std::function<void(int fd, std::string text)> add;
  std::function<bool()> full;  ///< Nothing more should be added.
};

/// One output stream of one process: whole lines go on, with the tag in front; without a tag all
/// goes on as it comes.
struct Stream {
  int from = -1;  ///< The pipe, non-blocking; -1 once it ended.
  int to = -1;
  std::string tag, pending;

  /// `at_end`: a last line without its end, too.
  void Forward(const LineSink& sink, bool at_end);
  /// Takes what lies in the pipe, as far as there is room.
  void Drain(const LineSink& sink);
};

}  // namespace bluefog::tools
