// Detects objects in an image without Python, by a model that `python -m models export` wrote:
//
//   detect MODEL.pt2 IMAGE.ppm LIBFOCALOPS.so...
//
// prints a line for each detection: label, score, x1, y1, x2, y2 in pixels of the image, which is
// resized as the model was trained where the package says so. The libraries register
// the ops of focalops: libfocalops.so, and for a model on a GPU libfocalops_cuda.so too.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kDivisor =
    32;  // of packages that do not say what height and width are multiples of

// A binary PPM, the plainest of formats: [height, width, 3].
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, most = 0;
  if (!(file >> magic >> width >> height >> most) || magic != "P6" || most != 255) {
    throw std::runtime_error(path + " is no binary PPM of 8 bits");
  }
  file.get();  // the one blank before the pixels
  at::Tensor image = at::empty({height, width, 3}, at::kByte);
  if (!file.read(reinterpret_cast<char*>(image.mutable_data_ptr()), image.numel())) {
    throw std::runtime_error(path + " ends before its pixels do");
  }
  return image;
}

// [3, height, width] with its shorter side resized to min_size, unless the longer one would exceed
// max_size: as torchvision's detectors do it.
at::Tensor resized(const at::Tensor& image, double min_size, double max_size) {
  const double height = image.size(1), width = image.size(2);
  const double scale =
      std::min(min_size / std::min(height, width), max_size / std::max(height, width));
  const int64_t new_height = std::floor(height * scale), new_width = std::floor(width * scale);
  if (new_height < 1 || new_width < 1) {
    throw std::runtime_error("the image is too thin to be resized");
  }
  return at::upsample_bilinear2d(image.unsqueeze(0), {new_height, new_width},
                                 /*align_corners=*/false)[0];
}

at::Tensor size_of(const at::Tensor& image) {
  const auto height = static_cast<float>(image.size(1)), width = static_cast<float>(image.size(2));
  return at::tensor({height, width}).unsqueeze(0);
}

void detect(const std::string& model_file, const std::string& image_file) {
  if (!std::ifstream(model_file)) {
    throw std::runtime_error(model_file + " cannot be opened");
  }
  torch::inductor::AOTIModelPackageLoader model(model_file);
  const auto metadata = model.get_metadata();
  const auto device = metadata.find("AOTI_DEVICE_KEY");
  const at::Device on(device == metadata.end() ? "cpu" : device->second);

  const at::Tensor original = read_ppm(image_file).permute({2, 0, 1}).to(at::kFloat).div(255);
  const auto min_size = metadata.find("min_size"), max_size = metadata.find("max_size");
  const bool resizes = min_size != metadata.end() && max_size != metadata.end();
  const at::Tensor image =
      resizes ? resized(original, std::stod(min_size->second), std::stod(max_size->second))
              : original;
  const int64_t height = image.size(1), width = image.size(2);
  const auto size_divisor = metadata.find("size_divisor");
  const int64_t divisor =
      size_divisor == metadata.end() ? kDivisor : std::stoll(size_divisor->second);
  const auto padded = [divisor](int64_t extent) {
    return (extent + divisor - 1) / divisor * divisor;
  };
  at::Tensor batch = at::zeros({1, 3, padded(height), padded(width)});
  batch[0].narrow(1, 0, height).narrow(2, 0, width).copy_(image);

  std::vector<at::Tensor> inputs = {batch.to(on), size_of(image).to(on)};
  if (resizes) {
    inputs.push_back(size_of(original).to(on));
  }
  std::vector<at::Tensor> outputs = model.run(inputs);
  for (at::Tensor& output : outputs) {
    output = output[0].cpu();
  }
  const auto boxes = outputs[0].accessor<float, 2>();
  const auto scores = outputs[1].accessor<float, 1>();
  const auto labels = outputs[2].accessor<int64_t, 1>();
  const int64_t count = outputs[3].item<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    std::printf("%lld %.4f %.2f %.2f %.2f %.2f\n", static_cast<long long>(labels[i]), scores[i],
                boxes[i][0], boxes[i][1], boxes[i][2], boxes[i][3]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: detect MODEL.pt2 IMAGE.ppm LIBFOCALOPS.so...\n");
    return 2;
  }
  for (int i = 3; i < argc; ++i) {
    if (dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      std::fprintf(stderr, "error: %s\n", dlerror());
      return 1;
    }
  }
  try {
    detect(argv[1], argv[2]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
