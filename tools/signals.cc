#include "signals.h"

#include <string.h>
#include <sys/signalfd.h>

namespace bluefog::tools {

int TakeSignals(std::initializer_list<int> wanted, sigset_t* inherited) {
  signal(SIGPIPE, SIG_IGN);
  sigset_t taken;
  sigemptyset(&taken);
  for (const int s : wanted) {
    struct sigaction before {};
    sigaction(s, nullptr, &before);
    if (s == SIGCHLD || before.sa_handler != SIG_IGN) sigaddset(&taken, s);
  }
  sigprocmask(SIG_BLOCK, &taken, inherited);
  return signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
}

std::string SignalName(int signal) {
  const char* name = sigabbrev_np(signal);
  return name == nullptr ? "signal " + std::to_string(signal) : std::string("SIG") + name;
}

}  // namespace bluefog::tools
