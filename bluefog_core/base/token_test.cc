#include "base/token.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

namespace bluefog {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class TokenFile : public ::testing::Test {
 protected:
  TokenFile() {
    std::string form = testing::TempDir() + "bluefog-token-XXXXXX";
    folder_ = mkdtemp(form.data());
  }
  ~TokenFile() override { std::filesystem::remove_all(folder_); }
  std::string Write(const std::string& text, mode_t mode = 0600) {
    const std::string path = folder_ + "/token";
    std::ofstream(path, std::ios::binary) << text;
    chmod(path.c_str(), mode);
    return path;
  }
  std::string Error(const std::string& path) {
    const StatusOr<std::string> token = ReadTokenFile(path);
    EXPECT_EQ(token.status().code(), absl::StatusCode::kInvalidArgument) << token.status();
    EXPECT_THAT(std::string(token.status().message()), HasSubstr("BLUEFOG_TOKEN_FILE=" + path));
    return std::string(token.status().message());
  }
  std::string folder_;
};

const std::string kRaw("\0\x01\xfe\xff 0123456789abcdefghijklmnop\n", 32);
constexpr char kHex[] = "0001feFF2030313233343536373839616263646566676869 6a6b6c6d6e6f700a";

TEST_F(TokenFile, RawOrHexadecimal) {
  std::string hex = kHex;
  std::erase(hex, ' ');
  ASSERT_EQ(kRaw.size(), kTokenBytes);
  EXPECT_EQ(ReadTokenFile(Write(kRaw)).value(), kRaw);
  EXPECT_EQ(ReadTokenFile(Write(hex)).value(), kRaw);
  EXPECT_EQ(ReadTokenFile(Write(hex + "\r\n", 0400)).value(), kRaw);
}

TEST_F(TokenFile, WhatIsNone) {
  for (const std::string& text :
       {std::string(), std::string("secret"), std::string(33, 'x'), std::string(63, 'a'),
        std::string(66, 'a'), std::string(64, 'g'), std::string(1000, 'a')}) {
    const std::string error = Error(Write(text));
    EXPECT_THAT(error, AllOf(HasSubstr("64 hexadecimal digits"), HasSubstr("/dev/urandom")));
    if (text.empty()) continue;
    EXPECT_THAT(error, Not(HasSubstr(text)));  // It may be almost right.
  }
  EXPECT_THAT(Error(folder_ + "/missing"), HasSubstr("No such file"));
  EXPECT_THAT(Error(folder_), HasSubstr("is no file"));
}

TEST_F(TokenFile, MustNotBeReadableByOthers) {
  for (const mode_t mode : {0644, 0640, 0604, 0620, 0601}) {
    EXPECT_THAT(Error(Write(kRaw, mode)), AllOf(HasSubstr("mode 06"), HasSubstr("chmod 600")));
  }
}

TEST(TokenDescriptor, IsReadAsOftenAsOneLikes) {
  const std::string token = RandomBytes(kTokenBytes).value();
  const int fd = MakeTokenDescriptor(token).value();
  EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(ReadTokenDescriptor(fd).value(), token);
  EXPECT_EQ(write(fd, "x", 1), -1);
  close(fd);
  EXPECT_THAT(std::string(ReadTokenDescriptor(fd).status().message()),
              AllOf(HasSubstr("BLUEFOG_TOKEN_FD=" + std::to_string(fd)), HasSubstr("no open"),
                    HasSubstr("BLUEFOG_TOKEN_FILE")));
}

TEST(TokenDescriptor, APipeIsRefused) {
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  EXPECT_THAT(std::string(ReadTokenDescriptor(fds[0]).status().message()), HasSubstr("pipe"));
  close(fds[0]);
  close(fds[1]);
}

TEST(Proof, HoldsForOneTokenPurposeContextAndNonceOnly) {
  const std::string token = RandomBytes(kTokenBytes).value();
  const std::string nonce = RandomBytes(kNonceBytes).value();
  const std::string proof = Prove(token, "who", "where", nonce);
  EXPECT_EQ(proof.size(), kProofBytes);
  EXPECT_TRUE(CheckProof(token, "who", "where", nonce, proof));
  EXPECT_FALSE(CheckProof("", "who", "where", nonce, proof));
  EXPECT_FALSE(CheckProof(RandomBytes(kTokenBytes).value(), "who", "where", nonce, proof));
  EXPECT_FALSE(CheckProof(token, "other", "where", nonce, proof));
  EXPECT_FALSE(CheckProof(token, "who", "elsewhere", nonce, proof));
  EXPECT_FALSE(CheckProof(token, "who", "where", RandomBytes(kNonceBytes).value(), proof));
  EXPECT_FALSE(CheckProof(token, "whow", "here", nonce, proof));  // Parts do not run together.
  EXPECT_FALSE(CheckProof(token, "who", "where", nonce, ""));
  EXPECT_FALSE(CheckProof(token, "who", "where", nonce, proof + "x"));
  for (size_t i = 0; i < proof.size(); ++i) {
    std::string other = proof;
    other[i] = static_cast<char>(other[i] ^ 1);
    EXPECT_FALSE(CheckProof(token, "who", "where", nonce, other));
  }
}

TEST(RandomBytes, AreNew) {
  std::set<std::string> seen;
  for (int i = 0; i < 100; ++i) seen.insert(RandomBytes(kNonceBytes).value());
  EXPECT_EQ(seen.size(), 100u);
}

}  // namespace
}  // namespace bluefog
