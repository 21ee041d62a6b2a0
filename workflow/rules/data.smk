# Run where Snakemake runs, as a cluster's nodes often have no network.
localrules:
    fetch,


rule fetch:
    input:
        fetch_inputs,
    output:
        directory("data/raw/{name}"),
    log:
        "logs/fetch/{name}.log",
    conda:
        "../envs/stlm.yaml"
    params:
        source=source_params,
    shell:
        "stlm fetch {wildcards.name} 2>&1 | tee {log}"


rule tokenize:
    input:
        tokenize_inputs,
    output:
        directory("data/tokens/{corpus}/{tokenizer}"),
    log:
        "logs/tokenize/{corpus}-{tokenizer}.log",
    conda:
        "../envs/stlm.yaml"
    threads: DATA_THREADS
    shell:
        "stlm tokenize {wildcards.corpus} {wildcards.tokenizer} 2>&1 | tee {log}"
