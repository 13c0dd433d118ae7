from typing import TypedDict

class BuildInfo(TypedDict):
    torch_version: str
    abi_target: str
    compiler: str
    cuda_version: str | None
    cuda_archs: str | None
    no_cuda_reason: str | None

def build_info() -> BuildInfo: ...
