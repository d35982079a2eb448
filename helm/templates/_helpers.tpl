{{/* Names, labels and amounts. */}}

{{- define "coe.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What pods are selected by. KubeRay keeps app.kubernetes.io/name of its pods for itself. */}}
{{- define "coe.selector" -}}
app.kubernetes.io/part-of: coe
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "coe.labels" -}}
{{ include "coe.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "coe.secretName" -}}
{{- .Values.secrets.existingSecret | default (printf "%s-secrets" (include "coe.fullname" .)) -}}
{{- end -}}

{{- define "coe.batchesClaimName" -}}
{{- if eq .Values.batches.type "existing" -}}
{{- required "batches.existingClaim is needed with batches.type existing" .Values.batches.existingClaim -}}
{{- else -}}
{{- printf "%s-batches" (include "coe.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "coe.claimName" -}}
{{- if eq .Values.modelCache.type "existing" -}}
{{- required "modelCache.existingClaim is needed with modelCache.type existing" .Values.modelCache.existingClaim -}}
{{- else -}}
{{- printf "%s-models" (include "coe.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "coe.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "coe.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* A memory amount (512Mi, 8Gi) as a number of MiB. */}}
{{- define "coe.mib" -}}
{{- $amount := toString . -}}
{{- if hasSuffix "Gi" $amount -}}
{{- mul 1024 (trimSuffix "Gi" $amount | int64) -}}
{{- else -}}
{{- trimSuffix "Mi" $amount | int64 -}}
{{- end -}}
{{- end -}}

{{/* An image: dict "root" $ "own" (a pool's) "gpus" (asked for). */}}
{{- define "coe.image" -}}
{{- $image := merge (dict) (.own | default dict) .root.Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- $target := ternary "gpu" "cpu" (gt (float64 .gpus) 0.0) -}}
{{- printf "%s:%s" $image.repository ($image.tag | default (printf "%s-%s" .root.Chart.AppVersion $target)) -}}
{{- end -}}
{{- end -}}

{{/* The config that runs: the user's, with what the chart decides. */}}
{{- define "coe.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if not $config -}}
{{- $config = .Files.Get "files/default-config.yaml" | fromYaml -}}
{{- end -}}
{{- $fixed := dict "host" "0.0.0.0" "port" 8000 -}}
{{- $redis := or .Values.redis.enabled (ne .Values.externalRedis.existingSecret "") -}}
{{- $many := and $redis (eq .Values.mode "kuberay") -}}
{{- $default := dict "gateways" (ternary 2 1 $many) "drain_s" 60 -}}
{{- $_ := set $config "server" (merge $fixed ($config.server | default dict) $default) -}}
{{- if $redis -}}
{{- $store := dict "kind" "redis" "url_env" "COE_REDIS_URL" -}}
{{- if or .Values.redis.enabled .Values.externalRedis.cacheKey -}}
{{- $_ := set $store "cache_url_env" "COE_CACHE_URL" -}}
{{- end -}}
{{- $_ := set $config "store" (merge $store ($config.store | default dict)) -}}
{{- end -}}
{{- $_ := set $config "models_dir" "/models" -}}
{{- if .Values.secrets.apiKey -}}
{{- $_ := set $config "keys" (merge (dict "chart" (dict "key_env" "COE_API_KEY")) ($config.keys | default dict)) -}}
{{- end -}}
{{- $told := dict "metrics_port" 9464 "metrics_host" "0.0.0.0" -}}
{{- $_ := set $config "telemetry" (merge $told ($config.telemetry | default dict)) -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Its pools, by kind, as JSON. */}}
{{- define "coe.pools" -}}
{{- (include "coe.config" . | fromYaml).pools | default dict | toJson -}}
{{- end -}}

{{/* A pool kind's values, its shared weights in shm: dict "root" $ "kind". */}}
{{- define "coe.pool" -}}
{{- $own := merge (dict) (deepCopy (index .root.Values.pools .kind | default dict)) (deepCopy .root.Values.poolDefaults) -}}
{{- $weights := include "coe.sharedMib" (dict "kind" .kind "pool" (index (include "coe.pools" .root | fromJson) .kind)) | int64 -}}
{{- include "coe.withShared" (dict "own" $own "weights" $weights) -}}
{{- end -}}

{{/* Pool values with so many MiB more in /dev/shm: dict "own" "weights". */}}
{{- define "coe.withShared" -}}
{{- $own := deepCopy .own -}}
{{- if gt (int64 .weights) 0 -}}
{{- $_ := set $own "shm" (printf "%dMi" (add (include "coe.mib" $own.shm | int64) (int64 .weights))) -}}
{{- end -}}
{{- toYaml $own -}}
{{- end -}}

{{/* MiB of /dev/shm in which a replica's engines share weights: dict "kind" "pool" (of the config). */}}
{{- define "coe.sharedMib" -}}
{{- $pool := .pool | default dict -}}
{{- $swap := $pool.swap | default dict -}}
{{- if and (gt (include "coe.gpus" $pool | int) 0) (eq (dig "method" "auto" $swap) "inplace") -}}
{{- if not $swap.host_bytes -}}
{{- fail (printf "config.pools.%s.swap: method inplace on a GPU keeps weights in /dev/shm, which is memory: it needs host_bytes" .kind) -}}
{{- end -}}
{{- $bytes := 0.0 -}}
{{- if kindIs "string" $swap.host_bytes -}}
{{- $unit := regexFind "[a-z]" (lower $swap.host_bytes) -}}
{{- $base := ternary 1024.0 1000.0 (contains "i" (lower $swap.host_bytes)) -}}
{{- $bytes = float64 (regexFind "[0-9.]+" $swap.host_bytes) -}}
{{- range $step := list "k" "m" "g" "t" -}}
{{- if has $unit (list "k" "m" "g" "t") -}}
{{- $bytes = mulf $bytes $base -}}
{{- if eq $unit $step -}}{{- $unit = "" -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- $bytes = float64 $swap.host_bytes -}}
{{- end -}}
{{- ceil (divf $bytes 1048576.0) | int64 -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{- define "coe.drainSeconds" -}}
{{- ceil (float64 (include "coe.config" . | fromYaml).server.drain_s) | int -}}
{{- end -}}

{{/* Gateways of the config as JSON: how many at least and at most, and their time to drain. */}}
{{- define "coe.gateways" -}}
{{- $given := (include "coe.config" . | fromYaml).server.gateways -}}
{{- if not (kindIs "map" $given) -}}
{{- $given = dict "min_replicas" $given -}}
{{- end -}}
{{- $least := dig "min_replicas" 1 $given | int -}}
{{- $most := $given.max_replicas | default $least | int -}}
{{- $drain := ternary (dig "downscale_drain_s" 900 $given | float64 | ceil | int) 0 (gt $most $least) -}}
{{- dict "least" $least "most" $most "drain" $drain | toJson -}}
{{- end -}}

{{- define "coe.gatewayCount" -}}
{{- (include "coe.gateways" . | fromJson).least | int -}}
{{- end -}}

{{- define "coe.gatewayMost" -}}
{{- (include "coe.gateways" . | fromJson).most | int -}}
{{- end -}}

{{/* GPUs of a pool of the config, whole ones: a pod can't have half of one. */}}
{{- define "coe.gpus" -}}
{{- ceil (float64 (dig "gpus" 0 (. | default dict))) | int -}}
{{- end -}}

{{/* Where Redis is: host and port, for Ray; empty where there is none of the chart's own. */}}
{{- define "coe.redisHost" -}}
{{- printf "%s-redis" .Release.Name -}}
{{- end -}}

{{/* Where the Redis for what may be lost is. */}}
{{- define "coe.cacheHost" -}}
{{- printf "%s-cache" .Release.Name -}}
{{- end -}}

{{/* Faults that the schema can't see. */}}
{{- define "coe.check" -}}
{{- $pools := include "coe.pools" . | fromJson -}}
{{- range $kind, $_ := .Values.pools -}}
{{- if not (hasKey $pools $kind) -}}
{{- fail (printf "pools.%s: config.pools has no such kind; it has: %s" $kind (keys $pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.redis.enabled .Values.externalRedis.existingSecret -}}
{{- fail "redis.enabled and externalRedis.existingSecret: choose one" -}}
{{- end -}}
{{- $made := include "coe.config" . | fromYaml -}}
{{- if not (or $made.keys $made.server.allow_unauthenticated (eq (dig "kind" "memory" ($made.store | default dict)) "redis")) -}}
{{- fail "without secrets.apiKey it needs config.keys, keys in a Redis, or config.server.allow_unauthenticated" -}}
{{- end -}}
{{- if not (or .Values.redis.enabled .Values.externalRedis.existingSecret (hasKey (.Values.config.store | default dict) "url") (hasKey (.Values.config.store | default dict) "url_env")) -}}
{{- $most := ternary .Values.keda.maxReplicas .Values.plain.replicas .Values.keda.enabled -}}
{{- if or (gt (int $most) 1) (gt (include "coe.gatewayMost" . | int) 1) -}}
{{- fail "several gateways need a Redis that they share: redis.enabled or externalRedis.existingSecret" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.keda.enabled (ne .Values.mode "plain") -}}
{{- fail "keda.enabled is for mode plain; with kuberay Ray scales pools (config.pools.KIND.max_replicas) and gateways" -}}
{{- end -}}
{{- if and .Values.keda.enabled (gt (int .Values.keda.minReplicas) (int .Values.keda.maxReplicas)) -}}
{{- fail "keda.maxReplicas must be at least keda.minReplicas" -}}
{{- end -}}
{{- if and .Values.kuberay.gcsFaultTolerance (not .Values.redis.enabled) -}}
{{- fail "kuberay.gcsFaultTolerance needs redis.enabled" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs" -}}
{{- end -}}
{{- $_ := include "coe.claimName" . -}}
{{- $_ := include "coe.batchesClaimName" . -}}
{{- end -}}
