//! What a forward pass must not depend on, and what it refuses.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use lite_decoder::{Block, DecoderError, Embedding, Head, InputId, NoTap, Role, Rope, Stream, Tap};

use crate::fixture::{CASES, Fixture, Random, values};

/// Keeps every input.
#[derive(Default)]
struct Recorder(Vec<(InputId, Tensor)>);

impl Tap for Recorder {
    fn input(&mut self, at: InputId, x: &Tensor) -> Result<(), DecoderError> {
        self.0.push((at, x.clone()));
        Ok(())
    }
}

#[test]
fn a_tap_changes_nothing_and_sees_what_linears_read() {
    for case in CASES {
        let fixture = Fixture::open(case);
        let windows = &fixture.batches[0].windows;
        let x = fixture.embed(windows);
        let rope = Rope::new(&fixture.spec, windows[0].len(), &Device::Cpu).unwrap();
        for index in 0..fixture.spec.blocks.len() {
            let block = fixture.block(index);
            let mut recorder = Recorder::default();
            let tapped = block.forward(&x, &rope, &mut recorder).unwrap();
            assert_eq!(values(&tapped), values(&block.forward(&x, &rope, &mut NoTap).unwrap()), "{case}");
            let seen: BTreeMap<InputId, Tensor> = recorder.0.iter().cloned().collect();
            assert_eq!(seen.len(), recorder.0.len(), "{case}: one call for each shared input");
            let rows = windows.len() * windows[0].len();
            let (inputs, mut routed) = (block.spec().inputs(), [0, 0]);
            assert!(seen.keys().all(|input| inputs.contains_key(input)), "{case}");
            for (input, width) in inputs {
                let Some(x) = seen.get(&input) else {
                    assert!(matches!(input.stream, Stream::ExpertIn(_) | Stream::ExpertMid(_)), "{case}: {input}");
                    continue;
                };
                assert!(x.is_contiguous() && x.dtype() == DType::F32);
                match input.stream {
                    Stream::ExpertIn(_) => routed[0] += x.dim(0).unwrap(),
                    Stream::ExpertMid(_) => routed[1] += x.dim(0).unwrap(),
                    _ => assert_eq!(x.dim(0).unwrap(), rows, "{case}: {input}"),
                }
                assert_eq!(x.dim(1).unwrap(), width, "{case}: {input}");
            }
            let top_k = block.spec().moe().map_or(0, |moe| moe.top_k);
            assert_eq!(routed, [rows * top_k; 2], "{case}: every token passes its experts");
        }
    }
}

/// A block large enough that every kernel and product is really cut into several tasks.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let mut fixture = Fixture::open("internlm2");
    let config = serde_json::json!({
        "architectures": ["InternLM2ForCausalLM"], "hidden_size": 320, "intermediate_size": 704,
        "num_hidden_layers": 1, "num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 50, "bias": true,
    });
    fixture.spec = lite_decoder::DecoderSpec::from_config(config.as_object().unwrap()).unwrap();
    let mut random = Random(3);
    for need in fixture.spec.tensors() {
        let values = (0..need.shape.iter().product()).map(|_| (random.next() - 0.5) * 0.3).collect();
        fixture.weights.tensors.insert(need.name, (need.shape, values));
    }
    let windows: Vec<Vec<u32>> = (0..2).map(|_| (0..300).map(|_| (random.next() * 50.0) as u32).collect()).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (case, windows) = (&fixture.spec, &windows);
        let (block, embedding) = (fixture.block(0), Embedding::load(case, &fixture.weights, &Device::Cpu).unwrap());
        pool.install(|| {
            let rope = Rope::new(case, 300, &Device::Cpu).unwrap();
            values(&block.forward(&embedding.embed(windows).unwrap(), &rope, &mut NoTap).unwrap())
        })
    };
    let one = run(1);
    assert!(one.iter().all(|v| v.is_finite()));
    assert!(one == run(2), "two threads give other bits than one");
    assert!(one == run(5), "five threads give other bits than one");
}

#[test]
fn windows_do_not_see_each_other() {
    let fixture = Fixture::open("qwen2-sliding");
    let windows = &fixture.batches[0].windows;
    let together = fixture.logits(windows);
    let alone: Vec<f32> = windows.iter().flat_map(|w| fixture.logits(std::slice::from_ref(w))).collect();
    let worst = together.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst < 1e-5, "{worst}");
}

#[test]
fn rows_of_the_embedding_equal_the_table() {
    let fixture = Fixture::open("llama2");
    let windows = vec![vec![5, 63, 5], vec![0, 1, 7]];
    let embedding = Embedding::load_rows(&fixture.spec, &fixture.weights, &windows, &Device::Cpu).unwrap();
    assert_eq!(values(&embedding.embed(&windows).unwrap()), values(&fixture.embed(&windows)));
    let message = embedding.embed(&[vec![8]]).unwrap_err().to_string();
    assert!(message.contains("token 8 was not loaded"), "{message}");
    let message = embedding.embed(&[vec![1], vec![1, 5]]).unwrap_err().to_string();
    assert!(message.contains("windows of 1 and of 2 tokens"), "{message}");
    assert!(embedding.embed(&[]).is_err() && embedding.embed(&[vec![]]).is_err());
    for result in [
        embedding.embed(&[vec![64]]).map(drop),
        Embedding::load_rows(&fixture.spec, &fixture.weights, &[vec![1, 64]], &Device::Cpu).map(drop),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("token 64 is outside of the vocabulary of 64"), "{message}");
    }
}

#[test]
fn logits_by_chunks_equal_all_at_once() {
    for case in ["llama3", "phi3"] {
        let fixture = Fixture::open(case);
        let head = Head::load(&fixture.spec, &fixture.weights, &Device::Cpu).unwrap();
        let x = fixture.embed(&fixture.batches[0].windows).flatten(0, 1).unwrap();
        let all = head.logits(&x).unwrap();
        let normed = head.norm(&x).unwrap();
        let half = fixture.spec.vocab / 2;
        for start in [0, half] {
            let wanted = values(&all.narrow(1, start, half).unwrap());
            let chunk = values(&head.logits_chunk(&normed, start, half).unwrap());
            let worst = wanted.iter().zip(&chunk).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst < 1e-5, "{worst}");
        }
        assert!(head.logits_chunk(&normed, half, half + 1).is_err());
        assert!(head.logits(&x.narrow(1, 0, 3).unwrap()).is_err());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut fixture = Fixture::open("qwen2");
    let windows = fixture.batches[0].windows.clone();
    let x = fixture.embed(&windows);
    let rope = Rope::new(&fixture.spec, windows[0].len(), &Device::Cpu).unwrap();
    let mut block = fixture.block(0);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    assert!(Rope::new(&fixture.spec, 0, &Device::Cpu).is_err());
    assert!(Rope::new(&fixture.spec, usize::MAX, &Device::Cpu).is_err());
    let short = Rope::new(&fixture.spec, 3, &Device::Cpu).unwrap();
    for (x, rope) in [(&x, &short), (&zeros(&[2, 40, 63]), &rope), (&zeros(&[40, 64]), &rope)] {
        let message = block.forward(x, rope, &mut NoTap).unwrap_err().to_string();
        assert!(message.contains("wanted F32 (windows, "), "{message}");
    }
    assert!(block.forward(&x.to_dtype(DType::F64).unwrap(), &rope, &mut NoTap).is_err());
    assert!(block.set_weight(Role::Q, zeros(&[64, 63])).is_err());
    assert!(block.set_weight(Role::Qkv, zeros(&[64, 64])).is_err());
    assert!(block.set_bias(Role::O, zeros(&[64])).is_err(), "o has no bias in this family");
    assert!(block.set_bias(Role::Q, zeros(&[63])).is_err());
    assert!(block.set_vector("model.layers.1.input_layernorm.weight", zeros(&[64])).is_err());
    assert!(Block::load(&fixture.spec, 2, &fixture.weights, &Device::Cpu).is_err());
    let name = "model.layers.0.self_attn.k_proj.bias";
    fixture.weights.tensors.get_mut(name).unwrap().0 = vec![1, 32];
    let message = Block::load(&fixture.spec, 0, &fixture.weights, &Device::Cpu).unwrap_err().to_string();
    assert_eq!(message, format!("tensor `{name}`: has shape [1, 32], wanted [32]"));
}

#[test]
fn a_failing_tap_ends_the_forward_pass() {
    struct Failing;
    impl Tap for Failing {
        fn input(&mut self, at: InputId, _: &Tensor) -> Result<(), DecoderError> {
            Err(DecoderError::Input { reason: format!("enough of {at}") })
        }
    }
    let fixture = Fixture::open("llama2");
    let windows = &fixture.batches[0].windows;
    let rope = Rope::new(&fixture.spec, windows[0].len(), &Device::Cpu).unwrap();
    let result = fixture.block(1).forward(&fixture.embed(windows), &rope, &mut Failing);
    assert_eq!(result.unwrap_err().to_string(), "enough of block 1 AttnIn");
}
