# For a tap: brew install tlora-mlx/tap/tlora-mlx. The release workflow's tag is what it builds from.
class TloraMlx < Formula
  desc "Task-aware LoRA (TLoRA) fine-tuning on Apple silicon, with an exporter to PEFT"
  homepage "https://github.com/tlora-mlx/tlora_mlx"
  url "https://github.com/tlora-mlx/tlora_mlx.git", tag: "v0.1.0"
  license "MIT"

  depends_on arch: :arm64
  depends_on macos: :sonoma # the oldest that MLX has wheels for
  depends_on "python@3.13"

  preserve_rpath # the names in wheels' libraries have no room for longer ones

  def install
    # MLX is published as wheels only, so that its dependencies come from PyPI.
    system "python3.13", "-m", "venv", libexec
    system libexec/"bin/pip", "install", "#{buildpath}[completion]"
    bin.install_symlink libexec/"bin/tlora"
    generate_completions_from_executable(
      bin/"tlora", "completion", shells: [:bash, :zsh], shell_parameter_format: :none
    )
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/tlora --version")
    assert_match "did you mean train", shell_output("#{bin}/tlora trian 2>&1", 2)
  end
end
