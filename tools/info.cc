// `bluefog info`: version, build, processor, components, plugins, memory; with --config every
// setting.
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include <bluefog/config.h>
#include <bluefog/optimizer.h>

#include "base/component.h"
#include "commands.h"
#include "format.h"
#include "kernels/kernels.h"

namespace bluefog::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSlotsPerBucket = 2;  // Payload slots D of the engine.

struct Options {
  bool config = false, json = false, job = false;
  int64_t model_bytes = 100 << 20;
};

std::string Compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string CpuModel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

std::string Join(const std::vector<std::string>& words, const char* nothing) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text.empty() ? nothing : text;
}

std::vector<std::string> SimdTargets() {
  const auto targets = kernels::SupportedTargets();
  return {targets.begin(), targets.end()};
}

const char* NameOf(PayloadTime time) {
  return time == PayloadTime::kEarly ? "before forward" : "with the gradient";
}

const char* NameOf(ConsumeTrigger trigger) {
  switch (trigger) {
    case ConsumeTrigger::kStep:
      return "at step()";
    case ConsumeTrigger::kCombined:
      break;
  }
  return "as soon as averaged";
}

std::string Requirements(const Traits& traits) {
  if (!traits.uses_topology) return "no graph";
  std::vector<std::string> words{"doubly stochastic"};
  if (traits.needs_symmetric) words.push_back("symmetric");
  if (traits.needs_static) words.push_back("static");
  return Join(words, "") + " graph";
}

std::vector<std::unique_ptr<Optimizer>> AllOptimizers() {
  std::vector<std::unique_ptr<Optimizer>> all;
  for (const std::string& name : OptimizerNames()) {
    StatusOr<std::unique_ptr<Optimizer>> plugin = MakeOptimizer(name);
    if (plugin.ok()) all.push_back(*std::move(plugin));
  }
  return all;
}

/// Are averages kept whole? Those of neighbours are consumed tile by tile; of an all-reduce each
/// rank computes a part only, and what is measured or consumed later must lie somewhere.
bool KeepsAverages(const Optimizer& optimizer) {
  constexpr int kSteps = 64;  // Longer than the period of any method.
  const Traits& traits = optimizer.traits();
  if (traits.measure_scope == MeasureScope::kParameter) return true;
  Hyper hyper;
  for (size_t i = 0; i < traits.hypers.size(); ++i) hyper.own[i] = traits.hypers[i].initial;
  for (int step = 0; step < kSteps; ++step) {
    for (const Exchange& exchange : optimizer.Plan(step, hyper)) {
      if (exchange.collective != Collective::kNeighborAllreduce) return true;
    }
  }
  return false;
}

double PinnedBytes(const Optimizer& optimizer, const Config& config, int64_t model_bytes) {
  const int buffers = optimizer.traits().payloads * (KeepsAverages(optimizer) ? 2 : 1);
  return static_cast<double>(kSlotsPerBucket * buffers) * static_cast<double>(model_bytes) +
         static_cast<double>(config.slot_bytes);
}

void PrintSettings(const std::vector<SettingInfo>& settings) {
  for (const SettingInfo& setting : settings) {
    const auto shown = [](const std::string& text) { return text.empty() ? "(not set)" : text; };
    std::cout << setting.variable << " = " << shown(setting.value)
              << (setting.value == setting.default_value
                      ? "   (default)"
                      : "   (default: " + shown(setting.default_value) + ")");
    std::cout << "\n    " << setting.help << "\n";
  }
}

void Print(const Config& config, int64_t model_bytes) {
  const auto line = [](const std::string& label, const std::string& value) {
    std::cout << "  " << Pad(label, 12) << value << "\n";
  };
  std::cout << "bluefog " BLUEFOG_VERSION "\n";
  line("build",
       std::string(BLUEFOG_BUILD_TYPE) +
           (std::string(BLUEFOG_SANITIZER).empty() ? "" : ", -fsanitize=" BLUEFOG_SANITIZER));
  line("compiler", Compiler());
  line("processor", fmt::format("{}, {} cores", CpuModel(), std::thread::hardware_concurrency()));
  line("SIMD", fmt::format("{} in use; this machine and build can: {}", kernels::ActiveTarget(),
                           Join(SimdTargets(), "–")));

  std::cout << "\nComponents\n";
  for (const ComponentInfo& component : DescribeComponents(config.component_dir)) {
    line(component.name,
         component.found ? "found    " + component.path : "missing  " + component.problem);
  }

  std::cout << "\nOptimizers\n";
  for (const auto& optimizer : AllOptimizers()) {
    const Traits& traits = optimizer->traits();
    line(traits.name, traits.summary);
    line("", fmt::format("source: {}", traits.source));
    line("", fmt::format("payloads: {}, sent {}, consumed {} · state: {} · needs: {}",
                         traits.payloads, NameOf(traits.payload_time), NameOf(traits.consume),
                         Join(traits.states, "none"), Requirements(traits)));
    if (!traits.delayed.empty()) line("", fmt::format("delayed: {}", traits.delayed));
    for (const HyperInfo& hyper : traits.hypers) {
      line("",
           fmt::format("beside lr, momentum, weight_decay: {} = {}", hyper.name, hyper.initial));
    }
  }

  std::cout << fmt::format(
      "\nMemory pinned per rank = D·P·S + slots, with S the bytes of the model, P the payloads of "
      "the\n"
      "optimizer (twice as many where averages are kept whole: all-reduce, delayed mode; half as "
      "many\n"
      "more with messages of half the bits), D = {} (two steps in flight) and slots = {} "
      "(BLUEFOG_SLOT_BYTES). It does not grow with the number of "
      "neighbours.\n"
      "For a model of {} (--model-bytes):\n",
      kSlotsPerBucket, FormatBytes(static_cast<double>(config.slot_bytes)),
      FormatBytes(static_cast<double>(model_bytes)));
  for (const auto& optimizer : AllOptimizers()) {
    line(optimizer->traits().name, FormatBytes(PinnedBytes(*optimizer, config, model_bytes)));
  }
}

Json AsJson(const Config& config, const std::vector<SettingInfo>& settings, int64_t model_bytes) {
  Json components = Json::array(), optimizers = Json::array(), table = Json::array();
  for (const ComponentInfo& component : DescribeComponents(config.component_dir)) {
    components.push_back({{"name", component.name},
                          {"found", component.found},
                          {"path", component.path},
                          {"problem", component.problem}});
  }
  for (const auto& optimizer : AllOptimizers()) {
    const Traits& traits = optimizer->traits();
    optimizers.push_back({{"name", traits.name},
                          {"summary", traits.summary},
                          {"source", traits.source},
                          {"payloads", traits.payloads},
                          {"states", traits.states},
                          {"payload_time", NameOf(traits.payload_time)},
                          {"consume", NameOf(traits.consume)},
                          {"delayed", traits.delayed},
                          {"delayed_reason", traits.delayed_reason},
                          {"uses_topology", traits.uses_topology},
                          {"needs_symmetric", traits.needs_symmetric},
                          {"needs_static", traits.needs_static},
                          {"needs_reason", traits.needs_reason},
                          {"pinned_bytes", PinnedBytes(*optimizer, config, model_bytes)}});
  }
  for (const SettingInfo& setting : settings) {
    table.push_back({{"variable", setting.variable},
                     {"type", setting.type},
                     {"value", setting.value},
                     {"default", setting.default_value},
                     {"help", setting.help}});
  }
  return {{"version", BLUEFOG_VERSION},
          {"build_type", BLUEFOG_BUILD_TYPE},
          {"sanitizer", BLUEFOG_SANITIZER},
          {"compiler", Compiler()},
          {"cpu", CpuModel()},
          {"cores", std::thread::hardware_concurrency()},
          {"simd", kernels::ActiveTarget()},
          {"simd_supported", SimdTargets()},
          {"components", std::move(components)},
          {"optimizers", std::move(optimizers)},
          {"memory",
           {{"slots_per_bucket", kSlotsPerBucket},
            {"slot_bytes", config.slot_bytes},
            {"model_bytes", model_bytes}}},
          {"config", std::move(table)}};
}

void RunInfo(const Options& options) {
  if (options.job) return DescribeJob(options.json);
  StatusOr<Config> config = Config::FromEnvironment();
  if (!config.ok()) Fail(config.status());
  StatusOr<std::vector<SettingInfo>> settings = DescribeConfig(*config);
  if (!settings.ok()) Fail(settings.status());
  if (options.json) {
    std::cout << AsJson(*config, *settings, options.model_bytes).dump(2) << "\n";
  } else if (options.config) {
    PrintSettings(*settings);
  } else {
    Print(*config, options.model_bytes);
  }
}

}  // namespace

void AddInfo(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("info", "Version, build, components, plugins, memory, settings");
  command->add_flag("--config", options->config, "Every setting: variable, value, meaning");
  command->add_flag(
      "--job", options->job,
      "As the command of a job: which rank is where, and how each reaches the others");
  command->add_flag("--json", options->json, "Everything, machine-readable");
  command
      ->add_option("--model-bytes", options->model_bytes, "Size of the model for the memory table")
      ->transform(Size())
      ->type_name("SIZE")
      ->default_str("100M");
  command->callback([options] { RunInfo(*options); });
}

}  // namespace bluefog::tools
