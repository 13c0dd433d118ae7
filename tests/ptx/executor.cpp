// Takes the place of the host compiler's code when the emulation launches a kernel: the kernel of
// the same name, out of the PTX files of a folder. Host functions, launches, streams and the watch
// over memory are the emulation's.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "machine.h"

namespace ptx {

namespace {

using Modules = std::vector<std::unique_ptr<Module>>;

std::string text_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Modules modules_of(const std::string& folder) {
  Modules modules;
  std::vector<std::filesystem::path> paths;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    if (file.path().extension() == ".ptx") {
      paths.push_back(file.path());
    }
  }
  std::sort(paths.begin(), paths.end());
  for (const auto& path : paths) {
    modules.push_back(std::make_unique<Module>(text_of(path), path.filename().string()));
  }
  return modules;
}

// The names of this library's functions, by their distance from its beginning. A kernel that
// several files have is from a header that they include. A kernel's shared variables, which bear
// its name too, are thread-local here: what stands for their address may be that of any function.
std::unordered_map<uintptr_t, std::string> function_names(const Dl_info& library) {
  std::unordered_map<uintptr_t, std::string> names;
  const std::string command =
      std::string("LD_PRELOAD= nm -p --defined-only '") + library.dli_fname + "'";
  FILE* const pipe = popen(command.c_str(), "r");
  char* line = nullptr;
  size_t room = 0;
  while (pipe != nullptr && getline(&line, &room, pipe) > 0) {
    std::string name(line);
    const size_t begin = name.rfind(' ') + 1;
    const std::string mangled = name.substr(begin, name.find_last_not_of('\n') + 1 - begin);
    const bool is_function = begin >= 2 && std::strchr("tTwW", name[begin - 2]) != nullptr;
    if (is_function && mangled.find("kernel") != std::string::npos) {
      names[std::strtoull(line, nullptr, 16)] = mangled;
    }
  }
  std::free(line);
  pclose(pipe);
  return names;
}

class PtxExecutor : public emulation::Executor {
 public:
  emulation::Region begin_launch(const cudaLaunchConfig_t& config, emulation::Kernel function,
                                 const std::vector<emulation::Argument>& arguments) override {
    find(function);
    Kernel& kernel = block_.module->kernel(name_);
    block_.kernel = &kernel;
    block_.dim = config.blockDim;
    block_.grid = config.gridDim;
    pass(kernel, arguments);
    if (config.blockDim.x * config.blockDim.y * config.blockDim.z > kernel.max_threads) {
      fail(name_ + " is launched with more threads than its launch bounds");
    }
    if (kernel.static_shared > 48 << 10) {
      fail(name_ + " has more than 48 KB of static shared memory");
    }
    for (Warp& warp : block_.warps) {  // what a register holds before it is written shows
      warp.registers.assign(static_cast<size_t>(kernel.registers), {});
      for (Lanes& lanes : warp.registers) {
        lanes.fill(0xfff8badbadbadbadu);
      }
    }
    block_.shared.resize((kernel.dynamic_shared_at + config.dynamicSmemBytes + 15) / 16 * 16);
    return {reinterpret_cast<uintptr_t>(block_.shared.data()), block_.shared.size()};
  }

  void run_block(int order, std::mt19937& random) override {
    ptx::run_block(block_, order, random);
  }

  std::string source_of(const void* instruction) override {
    const auto& i = *static_cast<const Instruction*>(instruction);
    return "`" + std::string(block_.module->text(i)) + "`, " + block_.module->source(i);
  }

  void load(const std::string& folder) {
    auto& modules = folders_[folder];
    if (modules.empty()) {
      modules = modules_of(folder);
    }
    modules_ = &modules;
  }

  // The next launch is of this kernel, whatever function it names.
  void override_next(Module* module, const std::string& name) {
    next_ = module;
    name_ = name;
  }

  void write_coverage(const std::string& path) const;

 private:
  void find(emulation::Kernel function) {
    if (next_ != nullptr) {
      block_.module = next_;
      next_ = nullptr;
      return;
    }
    Dl_info library;
    dladdr(reinterpret_cast<const void*>(&ptx::run_block), &library);
    if (functions_.empty()) {
      functions_ = function_names(library);
    }
    const auto offset =
        reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    const auto found = functions_.find(offset);
    if (found == functions_.end() || modules_ == nullptr) {
      fail("a kernel without a name, or no PTX");
    }
    name_ = canonical_name(found->second);
    for (const auto& module : *modules_) {
      if (module->has(name_)) {
        block_.module = module.get();
        return;
      }
    }
    fail("there is no PTX of " + name_);
  }

  void pass(const Kernel& kernel, const std::vector<emulation::Argument>& arguments) {
    block_.parameters.clear();
    for (const emulation::Argument& argument : arguments) {
      const size_t at = (block_.parameters.size() + argument.alignment - 1) / argument.alignment *
                        argument.alignment;
      block_.parameters.resize(at + argument.size);
      std::memcpy(block_.parameters.data() + at, argument.value, argument.size);
    }
    if (block_.parameters.size() != kernel.parameter_bytes) {
      fail(name_ + " takes " + std::to_string(kernel.parameter_bytes) +
           " bytes of parameters, not " + std::to_string(block_.parameters.size()));
    }
  }

  std::map<std::string, Modules> folders_;
  Modules* modules_ = nullptr;
  std::unordered_map<uintptr_t, std::string> functions_;  // by their distance from the beginning
  Block block_;
  std::string name_;
  Module* next_ = nullptr;
};

// It is not destroyed: what it knows is written when the process ends.
PtxExecutor& the_executor() {
  static auto& executor = *new PtxExecutor;
  return executor;
}

// For each kernel its name, its file, and how many instructions it has (0: it was never launched);
// for each instruction how many warps executed it, where it comes from, and its text.
void PtxExecutor::write_coverage(const std::string& path) const {
  std::ofstream out(path);
  for (const auto& module : *modules_) {
    for (const std::string& name : module->kernels()) {
      const Kernel* const kernel = module->decoded(name);
      const size_t count = kernel == nullptr ? 0 : kernel->code.size() - 1;  // the last one is ours
      out << "kernel\t" << name << "\t" << count << "\n";
      for (size_t k = 0; k < count; ++k) {
        const Instruction& i = kernel->code[k];
        out << kernel->executed[k] << "\t" << module->source(i) << "\t" << module->text(i) << "\n";
      }
    }
  }
}

const char* keep(const std::string& text) {
  static std::string kept;
  kept = text;
  return kept.c_str();
}

// What a call throws, as text; empty: nothing.
template <class F>
const char* message_of(F f) {
  try {
    f();
    return "";
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}

}  // namespace

}  // namespace ptx

// ---- what Python calls --------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

// From now on kernels are those of the PTX files in `folder`; null: the host compiler's.
EXPORT const char* focalops_ptx_use(const char* folder) {
  return ptx::message_of([&] {
    if (folder != nullptr) {
      ptx::the_executor().load(folder);
    }
    emulation::executor = folder == nullptr ? nullptr : &ptx::the_executor();
  });
}

EXPORT void focalops_ptx_set_approximation(uint64_t seed) { ptx::set_approximation(seed); }

EXPORT void focalops_ptx_allow_access(const void* begin, uint64_t size) {
  emulation::allow_access(begin, size);
}

EXPORT void focalops_ptx_write_coverage(const char* path) {
  ptx::the_executor().write_coverage(path);
}

// Runs one kernel of a PTX text, with the bytes of its parameters.
EXPORT const char* focalops_ptx_run(const char* text, const char* kernel, int blocks, int threads,
                                    uint64_t dynamic_shared, const void* parameters,
                                    uint64_t bytes) {
  return ptx::message_of([&] {
    static std::vector<std::unique_ptr<ptx::Module>> modules;  // an error may point into them
    modules.push_back(std::make_unique<ptx::Module>(text));
    auto& executor = ptx::the_executor();
    emulation::Executor* const before = emulation::executor;
    emulation::executor = &executor;
    executor.override_next(modules.back().get(), kernel);
    const cudaLaunchConfig_t config{dim3(blocks), dim3(threads), dynamic_shared, nullptr};
    try {
      emulation::launch(config, nullptr, {{parameters, bytes, 1}}, {});
    } catch (...) {
      emulation::executor = before;
      throw;
    }
    emulation::executor = before;
  });
}
