// SHA-256 (FIPS 180-4) and HMAC-SHA256 (RFC 2104), here so that the core needs no library for them.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace bluefog {

using Digest = std::array<uint8_t, 32>;

Digest Sha256(std::string_view message);
Digest HmacSha256(std::string_view key, std::string_view message);

}  // namespace bluefog
