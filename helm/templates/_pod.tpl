{{/* Parts of a pod. */}}

{{- define "coe.podBase" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{/* Where a pod goes: dict "root" $ "own" values "component" "kind" "class" "gpus". */}}
{{- define "coe.placement" -}}
{{- $class := .own.priorityClassName -}}
{{- if and (not $class) .root.Values.priorityClasses.create -}}
{{- $class = printf "%s-%s" (include "coe.fullname" .root) .class -}}
{{- end -}}
{{- with $class }}
priorityClassName: {{ . }}
{{- end }}
{{- with .own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .own.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .own.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .own.tolerations | default list -}}
{{- if gt (int .gpus) 0 -}}
{{- $tolerations = append $tolerations (dict "key" .own.gpuResource "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and .root.Values.topologySpread.enabled (ne .component "head") }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "coe.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
        {{- with $.kind }}
        coe/pool: {{ . }}
        {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Resources of a container: dict "own" values "gpus". /dev/shm is memory of the pod. */}}
{{- define "coe.resources" -}}
{{- $memory := printf "%dMi" (add (include "coe.mib" .own.memory | int64) (include "coe.mib" .own.shm | int64)) -}}
requests:
  cpu: {{ .own.cpu | quote }}
  memory: {{ $memory }}
limits:
  {{- with .own.cpuLimit }}
  cpu: {{ . | quote }}
  {{- end }}
  memory: {{ $memory }}
  {{- if gt (int .gpus) 0 }}
  {{ .own.gpuResource }}: {{ int .gpus }}
  {{- end }}
{{- end -}}

{{- define "coe.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .root.Values.tmpSize }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .own.shm }}
- name: config
  configMap:
    name: {{ include "coe.fullname" .root }}
{{- if ne .secrets "none" }}
- name: secrets
  secret:
    secretName: {{ include "coe.secretName" .root }}
    defaultMode: 0440
    items:
      - key: cluster-secret
        path: cluster-secret
      {{- if eq .secrets "all" }}
      - key: admin-key
        path: admin-key
      {{- end }}
{{- end }}
{{- if eq .secrets "all" }}
- name: batches
  {{- if eq .root.Values.batches.type "emptyDir" }}
  emptyDir:
    sizeLimit: {{ .root.Values.batches.size }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ include "coe.batchesClaimName" .root }}
  {{- end }}
{{- end }}
{{- if .models }}
- name: models
  {{- if eq .root.Values.modelCache.type "hostPath" }}
  hostPath:
    path: {{ .root.Values.modelCache.hostPath }}
    type: DirectoryOrCreate
  {{- else if eq .root.Values.modelCache.type "emptyDir" }}
  emptyDir:
    sizeLimit: {{ .root.Values.modelCache.size }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ include "coe.claimName" .root }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "coe.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
- name: config
  mountPath: /etc/coe
  readOnly: true
{{- if ne .secrets "none" }}
- name: secrets
  mountPath: /run/coe
  readOnly: true
{{- end }}
{{- if eq .secrets "all" }}
- name: batches
  mountPath: /batches
{{- end }}
{{- if .models }}
- name: models
  mountPath: /models
{{- end }}
{{- end -}}

{{/* What pods know, by "secrets": all (gateways and whole services: every key), cluster (pools: the
cluster's secret alone, which gateways show them), none. */}}

{{/* Environment of everything that runs coe. */}}
{{- define "coe.env" -}}
- name: COE_MODELS
  value: /models
{{- if eq .secrets "all" }}
- name: COE_HOME
  value: /run/coe
- name: COE_BATCHES
  value: /batches
- name: COE_RESPONSES
  value: /batches/responses
{{- if .root.Values.secrets.apiKey }}
- name: COE_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "coe.secretName" .root }}
      key: api-key
{{- end }}
{{- if .root.Values.redis.enabled }}
- name: COE_REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "coe.redisHost" .root }}
      key: password
- name: COE_REDIS_URL
  value: redis://:$(COE_REDIS_PASSWORD)@{{ include "coe.redisHost" .root }}:6379/0
- name: COE_CACHE_URL
  value: redis://:$(COE_REDIS_PASSWORD)@{{ include "coe.cacheHost" .root }}:6379/0
{{- else if .root.Values.externalRedis.existingSecret }}
- name: COE_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .root.Values.externalRedis.existingSecret }}
      key: {{ .root.Values.externalRedis.key }}
{{- with .root.Values.externalRedis.cacheKey }}
- name: COE_CACHE_URL
  valueFrom:
    secretKeyRef:
      name: {{ $.root.Values.externalRedis.existingSecret }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- with .root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What Ray reads when it starts, of deploy/ray/node.env: the same on every node. */}}
{{- define "coe.rayEnv" -}}
{{- $own := dict "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S" (add 5 (include "coe.drainSeconds" . | int) ((include "coe.gateways" . | fromJson).drain | int) | toString) -}}
{{- if .Values.kuberay.logsToStderr -}}
{{- $_ := set $own "RAY_SERVE_LOG_TO_STDERR" "1" -}}
{{- end -}}
{{- $limits := (include "coe.config" . | fromYaml).server.limits | default dict -}}
{{- with $limits.stall_timeout_s -}}
{{- $_ := set $own "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S" (ceil (float64 .) | int | toString) -}}
{{- end -}}
{{- range $line := .Files.Lines "files/node.env" -}}
{{- if regexMatch "^[A-Za-z_]+=" $line -}}
{{- $pair := regexSplit "=" $line 2 -}}
{{- if ne (first $pair) "RAY_AUTH_MODE" }}
- name: {{ first $pair }}
  value: {{ index $own (first $pair) | default (last $pair) | quote }}
{{- end -}}
{{- end -}}
{{- end }}
- name: RAY_SERVE_HAPROXY_BINARY_PATH
  value: /opt/coe/haproxy/haproxy.sh
{{- if .Values.kuberay.logsToStderr }}
- name: RAY_LOG_TO_STDERR
  value: "1"
{{- end }}
{{- end -}}

{{/* dict "root" $ "pool" (weights are fetched or run there) "gateway" (remote experts are asked there). */}}
{{- define "coe.envFrom" -}}
{{- $names := list -}}
{{- if .gateway -}}{{- $names = concat $names .root.Values.secrets.environment -}}{{- end -}}
{{- if .pool -}}{{- $names = concat $names .root.Values.secrets.poolEnvironment -}}{{- end -}}
{{- with uniq $names }}
envFrom:
  {{- range . }}
  - secretRef:
      name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Fetches weights before a pod's own container starts: dict "root" $ "own" "image" "kind". */}}
{{- define "coe.fetch" -}}
{{- if .root.Values.modelCache.download }}
initContainers:
  - name: models
    image: {{ .image }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [coe, models, pull, --config, /etc/coe/config.yaml{{ with .kind }}, --pool, {{ . }}{{ end }}]
    env:
      {{- with include "coe.env" (dict "root" .root "secrets" "none") | trim }}{{ . | nindent 6 }}{{- end }}
    {{- with include "coe.envFrom" (dict "root" .root "pool" true "gateway" false) | trim }}{{ . | nindent 4 }}{{- end }}
    securityContext:
      {{- toYaml .root.Values.containerSecurityContext | nindent 6 }}
    resources:
      requests:
        cpu: 250m
        memory: 2Gi
      limits:
        memory: 2Gi
    volumeMounts:
      {{- include "coe.mounts" (dict "models" true "secrets" "none") | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Probes of the HTTP port: starting until an expert answers, then alive and in service. */}}
{{- define "coe.httpProbes" -}}
startupProbe:
  httpGet:
    path: /ready
    port: http
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (int .Values.probes.startupSeconds) 5) }}
readinessProbe:
  httpGet:
    path: /health
    port: http
  periodSeconds: 2
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* One pod template of a Ray node. dict: root, own, component, class, kind, gpus, models, secrets, http. */}}
{{- define "coe.rayPod" -}}
{{- $image := include "coe.image" (dict "root" .root "own" .own.image "gpus" .gpus) -}}
{{- $drain := include "coe.drainSeconds" .root | int -}}
metadata:
  labels:
    {{- include "coe.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with .kind }}
    coe/pool: {{ . }}
    {{- end }}
  {{- with .own.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with include "coe.podBase" .root | trim }}{{ . | nindent 2 }}{{- end }}
  {{- with include "coe.placement" . | trim }}{{ . | nindent 2 }}{{- end }}
  {{- if ne .component "head" }}
  serviceAccountName: {{ include "coe.serviceAccountName" .root }}
  automountServiceAccountToken: false
  {{- end }}
  terminationGracePeriodSeconds: {{ add $drain 45 }}
  {{- if and .models .kind }}
  {{- with include "coe.fetch" (dict "root" .root "own" .own "image" $image "kind" .kind) | trim }}{{ . | nindent 2 }}{{- end }}
  {{- end }}
  containers:
    - name: ray-{{ .component }}
      image: {{ $image }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      env:
        {{- with include "coe.env" . | trim }}{{ . | nindent 8 }}{{- end }}
        {{- with include "coe.rayEnv" .root | trim }}{{ . | nindent 8 }}{{- end }}
      {{- with include "coe.envFrom" (dict "root" .root "pool" (eq .component "pool") "gateway" (eq .component "gateway")) | trim }}{{ . | nindent 6 }}{{- end }}
      ports:
        {{- if .http }}
        - name: http
          containerPort: 8000
        {{- end }}
        {{- if eq .component "head" }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        {{- end }}
        {{- if ne .component "head" }}
        - name: coe-metrics
          containerPort: 9464
        {{- end }}
        - name: metrics
          containerPort: 8080
      securityContext:
        {{- toYaml .root.Values.containerSecurityContext | nindent 8 }}
      resources:
        {{- include "coe.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "coe.mounts" . | nindent 8 }}
      livenessProbe:
        httpGet:
          path: {{ ternary "/api/gcs_healthz" "/api/local_raylet_healthz" (eq .component "head") }}
          port: {{ ternary 8265 52365 (eq .component "head") }}
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      {{- if .http }}
      {{- with include "coe.httpProbes" .root | trim }}{{ . | nindent 6 }}{{- end }}
      {{- else }}
      readinessProbe:
        httpGet:
          path: {{ ternary "/api/gcs_healthz" "/api/local_raylet_healthz" (eq .component "head") }}
          port: {{ ternary 8265 52365 (eq .component "head") }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 5
      {{- end }}
      lifecycle:
        {{- if .root.Values.kuberay.auth }}
        # The operator makes Ray's ports ask for a token. One too old to know of that would leave them
        # open without a word: then the container is not left running.
        postStart:
          exec:
            command:
              - sh
              - -c
              - |
                [ "$RAY_AUTH_MODE" = token ] && exit 0
                echo "RAY_AUTH_MODE is not token: this KubeRay operator does not know authOptions (1.5 or newer does); kuberay.auth"
                exit 1
        {{- end }}
        preStop:
          exec:
            {{- if eq .component "head" }}
            # The others need it to leave in order.
            command: [sleep, "{{ add $drain 25 }}"]
            {{- else }}
            command: [python3, -m, service.deployment.drain_node, --within, "{{ add $drain 25 }}"]
            {{- end }}
  volumes:
    {{- include "coe.volumes" . | nindent 4 }}
{{- end -}}
