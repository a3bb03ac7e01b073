// The job token: 32 random bytes that all ranks of a job have and strangers do not. It never
// travels: who is asked proves that it has it (challenge and response), bound to a purpose and to a
// nonce that the asker has just made. A token is a secret: never log it, never put it in an error.
#pragma once

#include <string>
#include <string_view>

#include <bluefog/status.h>

namespace bluefog {

inline constexpr size_t kTokenBytes = 32, kNonceBytes = 32, kProofBytes = 32;

/// Fresh randomness from the kernel: a token (for launchers) or a nonce (a new one for each
/// challenge). ResourceExhausted if there is none.
StatusOr<std::string> RandomBytes(size_t bytes);

/// The token of a file: 64 hexadecimal digits or the 32 bytes themselves; white space behind them
/// is allowed for digits. Nobody but the owner may be able to read the file.
StatusOr<std::string> ReadTokenFile(const std::string& path);
/// The same of an open descriptor, always from the start: several processes may share it. No pipe.
StatusOr<std::string> ReadTokenDescriptor(int fd);
/// An anonymous file that holds the token, for a child to inherit (BLUEFOG_TOKEN_FD). CLOEXEC: the
/// child clears that between fork and exec. -1 is never returned.
StatusOr<int> MakeTokenDescriptor(const std::string& token);

/// HMAC-SHA256 over `purpose`, `context` and `nonce`. `purpose` says who proves what to whom
/// ("control client", "ucx accept", …): the two ends of a connection must use different ones, or a
/// challenge could be sent back as a question. The context binds the proof to what else must not
/// be exchanged (job, ranks). An empty token proves nothing, but is equal on both ends, too.
std::string Prove(std::string_view token, std::string_view purpose, std::string_view context,
                  std::string_view nonce);
/// Whether `proof` is what Prove gives; the time it takes says nothing of the right answer.
bool CheckProof(std::string_view token, std::string_view purpose, std::string_view context,
                std::string_view nonce, std::string_view proof);

/// What a rank is told whose proof is wrong, be its token missing or another one.
inline constexpr char kTokenRefused[] =
    "the job token is missing or not the same on all ranks: give each rank the same one, by "
    "BLUEFOG_TOKEN_FILE=path or BLUEFOG_TOKEN_FD=number";

}  // namespace bluefog
