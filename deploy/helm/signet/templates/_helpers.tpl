{{/* Names: signet-ca, signet-agent and signet-inject for the release signet. */}}
{{- define "signet.ca" -}}{{ .Release.Name }}-ca{{- end }}
{{- define "signet.agent" -}}{{ .Release.Name }}-agent{{- end }}
{{- define "signet.inject" -}}{{ .Release.Name }}-inject{{- end }}

{{/* Labels of all objects of a component: (list $ "ca") */}}
{{- define "signet.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ $root.Chart.Name }}-{{ $root.Chart.Version }}
app.kubernetes.io/version: {{ include "signet.tag" $root | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: signet
{{ include "signet.selector" . }}
{{- end }}

{{/* Labels by which a component's pods are found; they never change. */}}
{{- define "signet.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: signet-{{ index . 1 }}
app.kubernetes.io/instance: {{ quote $root.Release.Name }}
{{- end }}

{{- define "signet.tag" -}}{{ .Values.image.tag | default .Chart.AppVersion }}{{- end }}

{{/* An image: (list $ "signet-ca") */}}
{{- define "signet.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.image.registry }}/{{ index . 1 }}:{{ include "signet.tag" $root }}
{{- end }}

{{- define "signet.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ quote . }}
{{- end }}
{{- end }}
{{- end }}

{{/* The keys of the Secret with seal keys that the CA needs: the present one, and one from before. */}}
{{- define "signet.sealKeys" -}}
{{- $v := .Values.ca -}}
{{- $keys := list -}}
{{- if eq $v.seal.source "secret" }}{{ $keys = append $keys $v.seal.secretKey }}{{ end -}}
{{- with dig "seal" "previous" "systemd_credential" "" $v.config }}{{ $keys = append $keys . }}{{ end -}}
{{- range $i, $key := uniq $keys }}{{ if $i }}, {{ end }}{key: {{ quote $key }}, path: {{ quote $key }}}{{ end -}}
{{- end }}

{{/* What a configuration is for, by which an upgrade to another one is known. */}}
{{- define "signet.of" -}}
signet-id.github.io/trust-domain: {{ quote .Values.trustDomain }}
signet-id.github.io/cluster: {{ quote .Values.clusterName }}
{{- end }}

{{/* Mistakes that a schema cannot see. */}}
{{- define "signet.check" -}}
{{- $v := .Values -}}
{{- if or (contains "." .Release.Name) (gt (len .Release.Name) 40) }}
{{- fail (printf "release name %q: names of pods and Services begin with it; take one of 40 letters, digits and dashes at most" .Release.Name) }}
{{- end }}
{{- range $name := list (include "signet.ca" .) (include "signet.agent" .) }}
{{- $was := dig "metadata" "annotations" dict (lookup "v1" "ConfigMap" $.Release.Namespace $name) }}
{{- range $value, $is := dict "trustDomain" $v.trustDomain "clusterName" $v.clusterName }}
{{- $before := dig (ternary "signet-id.github.io/trust-domain" "signet-id.github.io/cluster" (eq $value "trustDomain")) $is $was }}
{{- if ne $is $before }}
{{- fail (printf "%s: %q here was installed with %q, which cannot be changed: no pod would have its identity any more; put that back, or uninstall first" $value $name $before) }}
{{- end }}
{{- end }}
{{- end }}
{{- if $v.agent.enabled }}
{{- $data := printf "%s/agent/" $v.agent.dataDirectory }}
{{- $socket := printf "%s/" $v.agent.socket.directory }}
{{- if or (hasPrefix $socket $data) (hasPrefix $data $socket) }}
{{- fail (printf "agent.socket.directory: %s, which pods mount, and %s, where the agent keeps its keys (agent.dataDirectory), must not be within each other; choose another directory, such as /run/signet/agent" $v.agent.socket.directory (trimSuffix "/" $data)) }}
{{- end }}
{{- if and (not $v.agent.kubelet.legacyAuthorization) (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "agent.kubelet.legacyAuthorization: Kubernetes %s knows no nodes/pods, so that agents could not ask their kubelets; true takes nodes/proxy in its place, which is much more (docs/kubernetes/chart.md)" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- end }}
{{- if $v.ca.enabled }}
{{- if and $v.ca.kubernetes.injection.enabled (semverCompare "<1.29.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "ca.kubernetes.injection.enabled: needs native sidecars, which Kubernetes has from 1.29 on; this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and (gt (int $v.ca.replicas) 1) (ne $v.ca.store.type "etcd") }}
{{- fail (printf "ca.replicas: %d replicas need ca.store.type: etcd; bolt is one file for one CA" (int $v.ca.replicas)) }}
{{- end }}
{{- if and (eq $v.ca.store.type "etcd") (not $v.ca.store.etcd.endpoints) }}
{{- fail "ca.store.etcd.endpoints: missing; name the members of your etcd, such as https://etcd-0.etcd:2379" }}
{{- end }}
{{- if and (eq $v.ca.store.type "etcd") (not $v.ca.store.etcd.tlsSecret) }}
{{- fail "ca.store.etcd.tlsSecret: missing; name a Secret with tls.crt, tls.key and ca.crt: who writes to etcd below the prefix owns the trust domain" }}
{{- end }}
{{- if and $v.ca.kubernetes.podCertificates (not $v.ca.kubernetes.pods) }}
{{- fail "ca.kubernetes.podCertificates: needs ca.kubernetes.pods: a certificate is for the pod's identity" }}
{{- end }}
{{- if and $v.ca.kubernetes.spireResources (not $v.ca.kubernetes.pods) }}
{{- fail "ca.kubernetes.spireResources: needs ca.kubernetes.pods: the resources give pods their identities" }}
{{- end }}
{{- if and (eq $v.ca.store.type "etcd") (eq $v.ca.seal.source "file") }}
{{- fail "ca.seal.source: with ca.store.type etcd all replicas need the same seal key; use secret or kms" }}
{{- end }}
{{- if and (dig "seal" "previous" "systemd_credential" "" $v.ca.config) (not $v.ca.seal.secretName) }}
{{- fail "ca.seal.secretName: missing; ca.config.seal.previous.systemd_credential is a key of that Secret" }}
{{- end }}
{{- if and $v.agent.enabled (not $v.ca.kubernetes.bundle) (not $v.agent.bundleConfigMap) }}
{{- fail "agent.bundleConfigMap: missing; without ca.kubernetes.bundle nobody makes signet-bundle, so name a ConfigMap with the CA's bundle as bundle.pem" }}
{{- end }}
{{- else if and $v.agent.enabled (not $v.agent.serverAddress) }}
{{- fail "agent.serverAddress: missing; without a CA in this release (ca.enabled: false) name the CA's host:port" }}
{{- else if and $v.agent.enabled (not $v.agent.bundleConfigMap) }}
{{- fail "agent.bundleConfigMap: missing; without a CA in this release (ca.enabled: false) name a ConfigMap with the CA's bundle (signet bundle show --format pem) as bundle.pem" }}
{{- end }}
{{- end }}
