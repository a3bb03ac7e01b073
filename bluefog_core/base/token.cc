#include "base/token.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "base/sha256.h"

namespace bluefog {
namespace {

constexpr char kFormat[] =
    "a token is 64 hexadecimal digits or 32 bytes (make one with: (umask 077; head -c 32 "
    "/dev/urandom > FILE))";

int HexValue(char c) {
  if ('0' <= c && c <= '9') return c - '0';
  if ('a' <= c && c <= 'f') return c - 'a' + 10;
  if ('A' <= c && c <= 'F') return c - 'A' + 10;
  return -1;
}

StatusOr<std::string> Parse(std::string text, const std::string& where) {
  if (text.size() == kTokenBytes) return text;
  const size_t size = text.size();
  while (!text.empty() && strchr(" \t\r\n", text.back()) != nullptr) text.pop_back();
  std::string token;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    const int high = HexValue(text[i]), low = HexValue(text[i + 1]);
    if (high < 0 || low < 0) break;
    token += static_cast<char>(16 * high + low);
  }
  if (token.size() == kTokenBytes && text.size() == 2 * kTokenBytes) return token;
  return absl::InvalidArgumentError(where + " holds no job token (" + std::to_string(size) +
                                    " bytes): " + kFormat);
}

/// What lies in `fd`, as far as it matters; from the start whatever others have read.
StatusOr<std::string> Read(int fd, const std::string& where) {
  std::array<char, 256> bytes;
  ssize_t n;
  do {
    n = pread(fd, bytes.data(), bytes.size(), 0);
  } while (n < 0 && errno == EINTR);
  if (n >= 0) return Parse(std::string(bytes.data(), static_cast<size_t>(n)), where);
  if (errno == ESPIPE) {
    return absl::InvalidArgumentError(
        where + " is a pipe or a socket, which can be read only once: let it be a file");
  }
  return absl::InvalidArgumentError(where + " cannot be read: " + std::strerror(errno));
}

/// Each part with its length, so that no two sets of parts look alike.
std::string Joined(std::initializer_list<std::string_view> parts) {
  std::string text;
  for (const std::string_view part : parts) {
    const uint64_t size = part.size();
    for (int shift = 0; shift < 64; shift += 8) text += static_cast<char>(size >> shift);
    text += part;
  }
  return text;
}

}  // namespace

StatusOr<std::string> RandomBytes(size_t bytes) {
  std::string random(bytes, '\0');
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = getrandom(random.data() + done, bytes - done, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      return absl::ResourceExhaustedError(std::string("no random numbers: ") +
                                          std::strerror(errno));
    }
    done += static_cast<size_t>(n);
  }
  return random;
}

StatusOr<std::string> ReadTokenFile(const std::string& path) {
  const std::string where = "BLUEFOG_TOKEN_FILE=" + path;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) {
    return absl::InvalidArgumentError(where + " cannot be opened: " + std::strerror(errno));
  }
  struct stat info {};
  fstat(fd, &info);
  std::array<char, 8> mode;
  snprintf(mode.data(), mode.size(), "%04o", info.st_mode & 07777U);
  StatusOr<std::string> token =
      !S_ISREG(info.st_mode) ? absl::InvalidArgumentError(where + " is no file")
      : (info.st_mode & 077U) != 0
          ? absl::InvalidArgumentError(where + " has mode " + mode.data() +
                                       ", so that others than its owner can get at the token: "
                                       "chmod 600 " +
                                       path)
          : Read(fd, where);
  close(fd);
  return token;
}

StatusOr<std::string> ReadTokenDescriptor(int fd) {
  const std::string where = "BLUEFOG_TOKEN_FD=" + std::to_string(fd);
  if (fcntl(fd, F_GETFD) < 0) {
    return absl::InvalidArgumentError(
        where +
        " is no open descriptor: a program between the launcher and this one closed it; give the "
        "token by BLUEFOG_TOKEN_FILE");
  }
  return Read(fd, where);
}

StatusOr<int> MakeTokenDescriptor(const std::string& token) {
  const int fd = memfd_create("bluefog-token", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd >= 0 && write(fd, token.data(), token.size()) == static_cast<ssize_t>(token.size()) &&
      fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
    return fd;
  }
  const int error = errno;
  if (fd >= 0) close(fd);
  return absl::ResourceExhaustedError(std::string("no memory file for the job token: ") +
                                      std::strerror(error));
}

std::string Prove(std::string_view token, std::string_view purpose, std::string_view context,
                  std::string_view nonce) {
  const Digest digest = HmacSha256(token, Joined({"bluefog proof 1", purpose, context, nonce}));
  return std::string(reinterpret_cast<const char*>(digest.data()), digest.size());
}

bool CheckProof(std::string_view token, std::string_view purpose, std::string_view context,
                std::string_view nonce, std::string_view proof) {
  const std::string right = Prove(token, purpose, context, nonce);
  if (proof.size() != right.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < right.size(); ++i) {
    difference |= static_cast<unsigned char>(proof[i] ^ right[i]);
  }
  return difference == 0;
}

}  // namespace bluefog
