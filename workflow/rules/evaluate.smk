rule evaluate:
    input:
        evaluate_inputs,
    output:
        outputs("results/{study}/runs/{run}", EVALUATION),
    log:
        "logs/{study}/evaluate/{run}.log",
    conda:
        "../envs/stlm.yaml"
    threads: RUN_THREADS
    resources:
        gpu=GPUS,
    params:
        launch=launch_alone,
        evaluation=evaluation_params,
        set=set_arguments,
    shell:
        "{params.launch} evaluate {wildcards.study} {wildcards.run}{params.set} 2>&1 | tee {log}"


rule contamination:
    input:
        contamination_inputs,
    output:
        outputs("results/{study}", CONTAMINATION),
    log:
        "logs/{study}/contamination.log",
    conda:
        "../envs/stlm.yaml"
    params:
        evaluation=items_params,
        set=set_arguments,
    shell:
        "stlm contamination {wildcards.study}{params.set} 2>&1 | tee {log}"


rule evaluate_published:
    input:
        published_inputs,
    output:
        outputs("results/{study}/published/{published}", EVALUATION),
    log:
        "logs/{study}/evaluate/{published}.log",
    conda:
        "../envs/stlm.yaml"
    threads: RUN_THREADS if GPUS else MACHINE
    resources:
        gpu=GPUS,
    params:
        launch=launch_alone,
        evaluation=evaluation_params,
        published=published_params,
        set=set_arguments,
    shell:
        "{params.launch} evaluate {wildcards.study} {wildcards.published}{params.set} 2>&1 | tee {log}"
