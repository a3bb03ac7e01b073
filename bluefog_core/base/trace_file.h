// A JSON array in a file that others may read at any time while records are added. The file is laid
// out ahead: records, then blanks, then "]". A record replaces blanks inside one page, so that who
// reads at once or by whole pages sees all of it or none; when the blanks are used up, a larger
// copy takes the file's place by rename().
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <bluefog/status.h>

namespace bluefog {

/// Not thread-safe. After the first error the file stays as it was last, and every call returns
/// that error.
class TraceFile {
 public:
  static constexpr int64_t kPage = 4096;

  TraceFile() = default;
  ~TraceFile() { (void)Close(); }
  TraceFile(const TraceFile&) = delete;
  TraceFile& operator=(const TraceFile&) = delete;

  /// Creates or replaces `path` with an array of one JSON value. Errors name the path.
  Status Open(const std::string& path, const std::string& first_record);
  /// Adds one JSON value of less than a page; in the file after Flush. False, and nothing is added,
  /// if it is too long.
  bool Add(std::string_view record);
  /// A file that somebody removed is not created again: that is an error, too.
  Status Flush();
  /// Flushes and cuts the blanks off.
  Status Close();

 private:
  /// Puts a copy of the records with room up to `capacity` bytes in the file's place.
  Status Replace(int64_t capacity);

  std::string path_;
  int fd_ = -1;
  int64_t capacity_ = 0;  // Bytes of the file, the end of the array included.
  int64_t written_ = 0;   // Bytes of it that hold records.
  std::string pending_;   // To go to offset written_.
  Status status_;
};

}  // namespace bluefog
