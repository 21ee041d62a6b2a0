rule teach:
    input:
        teach_inputs,
    output:
        directory("data/taught/{corpus}/{tokenizer}/{answers}"),
    log:
        "logs/teach/{corpus}-{tokenizer}-{answers}.log",
    conda:
        "../envs/stlm.yaml"
    threads: DATA_THREADS
    resources:
        gpu=GPUS,
    params:
        launch=launch_alone,
        teach=teach_arguments,
        set=set_arguments,
    shell:
        "{params.launch} teach {params.teach}{params.set} 2>&1 | tee {log}"
