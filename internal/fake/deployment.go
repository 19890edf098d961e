package fake

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utiljson "k8s.io/apimachinery/pkg/util/json"
)

var restartedAtPath = []string{"spec", "template", "metadata", "annotations", "kubectl.kubernetes.io/restartedAt"}

// Spec describes a Deployment.
type Spec struct {
	Image       string // of the one container; Init and Volume add to it
	Init        string
	Volume      string
	Policy      string // imagePullPolicy, Always if empty
	Paused      bool
	Deleting    bool
	RestartedAt string
	Created     time.Time // ten days ago if zero
	Labels      map[string]string
}

func (s Spec) object(key, uid string) *unstructured.Unstructured {
	type m = map[string]any
	if s.Policy == "" {
		s.Policy = "Always"
	}
	if s.Created.IsZero() {
		s.Created = time.Now().Add(-240 * time.Hour)
	}
	namespace, name, _ := strings.Cut(key, "/")
	meta := m{"namespace": namespace, "name": name, "uid": uid, "generation": 1, "labels": s.Labels, "creationTimestamp": metav1.NewTime(s.Created)}
	if s.Deleting {
		meta["deletionTimestamp"] = metav1.Now()
	}
	pod := m{"containers": []any{m{"name": "main", "image": s.Image, "imagePullPolicy": s.Policy}}}
	if s.Init != "" {
		pod["initContainers"] = []any{m{"name": "init", "image": s.Init, "imagePullPolicy": s.Policy}}
	}
	if s.Volume != "" {
		pod["volumes"] = []any{m{"name": "data", "image": m{"reference": s.Volume, "pullPolicy": s.Policy}}}
	}
	u := &unstructured.Unstructured{Object: clone(m{"kind": "Deployment", "apiVersion": "apps/v1", "metadata": meta,
		"spec": m{"paused": s.Paused, "template": m{"spec": pod}}, "status": m{"observedGeneration": 1}})}
	if s.RestartedAt != "" {
		unstructured.SetNestedField(u.Object, s.RestartedAt, restartedAtPath...)
	}
	manage(u, "kubectl", "", s.Created, true)
	return u
}

// ownsPods is the fieldsV1 of a manager that has set the pod template's spec.
const ownsPods = `{"f:spec":{"f:template":{"f:spec":{}}}}`

// manage notes in managedFields who changed the object last, when, and whether that
// manager has ever changed the pods.
func manage(u *unstructured.Unstructured, manager, subresource string, at time.Time, pods bool) {
	fields := "{}"
	entries := slices.DeleteFunc(u.GetManagedFields(), func(e metav1.ManagedFieldsEntry) bool {
		same := e.Manager == manager && e.Subresource == subresource
		if same {
			fields = e.FieldsV1.GetRawString()
		}
		return same
	})
	if pods {
		fields = ownsPods
	}
	u.SetManagedFields(append(entries, metav1.ManagedFieldsEntry{
		Manager: manager, Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "apps/v1", Subresource: subresource,
		Time: &metav1.Time{Time: at}, FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(fields)}))
}

// Create makes a Deployment. One that exists is made anew, with another uid.
func (k *KubernetesAPI) Create(key string, s Spec) {
	k.Delete(key)
	k.Lock()
	defer k.Unlock()
	k.store(key, s.object(key, fmt.Sprint("uid-", k.version)), "ADDED")
}

// Change alters a Deployment as somebody with kubectl would, now.
func (k *KubernetesAPI) Change(key string, f func(object map[string]any)) {
	k.change(key, "kubectl", "", time.Now(), f)
}

// ChangeAs is Change by another field manager, at another time.
func (k *KubernetesAPI) ChangeAs(key, manager string, at time.Time, f func(object map[string]any)) {
	k.change(key, manager, "", at, f)
}

// ChangeStatus alters the status, as the Deployment controller does.
func (k *KubernetesAPI) ChangeStatus(key string, f func(object map[string]any)) {
	k.change(key, "kube-controller-manager", "status", time.Now(), f)
}

func (k *KubernetesAPI) change(key, manager, subresource string, at time.Time, f func(object map[string]any)) {
	k.Lock()
	defer k.Unlock()
	if k.objects[key] == nil {
		k.unexpected("change of %s, which does not exist", key)
		return
	}
	object := clone(k.objects[key])
	f(object)
	k.update(key, clone(object), manager, subresource, at)
}

// Delete removes a Deployment, if it exists.
func (k *KubernetesAPI) Delete(key string) {
	k.Lock()
	defer k.Unlock()
	if old := k.objects[key]; old != nil {
		k.store(key, &unstructured.Unstructured{Object: clone(old)}, "DELETED")
	}
}

// ChangeUnseen keeps what f does from the open watches. A later watch from an
// older version brings it.
func (k *KubernetesAPI) ChangeUnseen(f func()) {
	k.setUnseen(true)
	defer k.setUnseen(false)
	f()
}

func (k *KubernetesAPI) setUnseen(unseen bool) {
	k.Lock()
	defer k.Unlock()
	k.unseen = unseen
}

// BreakWatches ends all watches with 410, as a restarted API server does, and
// forgets what happened: a watch from an older version gets 410 too.
func (k *KubernetesAPI) BreakWatches() {
	k.Lock()
	defer k.Unlock()
	k.compacted = k.version
	for to := range k.watchers {
		k.send(to, expired, event{})
	}
}

// EndWatches ends all watches as an API server does after timeoutSeconds.
func (k *KubernetesAPI) EndWatches() {
	k.Lock()
	defer k.Unlock()
	for to := range k.watchers {
		k.send(to, event{})
	}
}

// ExpireContinue lets the next continue token that is used have expired.
func (k *KubernetesAPI) ExpireContinue() {
	k.Lock()
	defer k.Unlock()
	k.expire = true
}

// Object returns a copy of a Deployment, or nil.
func (k *KubernetesAPI) Object(key string) map[string]any {
	k.Lock()
	defer k.Unlock()
	return clone(k.objects[key])
}

// RestartedAt returns a Deployment's restartedAt annotation.
func (k *KubernetesAPI) RestartedAt(key string) string { return restartedAtOf(k.Object(key)) }

// Patches returns the patches of a Deployment, or of all for "".
func (k *KubernetesAPI) Patches(key string) []PatchCall {
	k.Lock()
	defer k.Unlock()
	return slices.DeleteFunc(slices.Clone(k.patches), func(c PatchCall) bool { return key != "" && c.Key != key })
}

// Applied returns the values that patches changed restartedAt to.
func (k *KubernetesAPI) Applied(key string) []string {
	k.Lock()
	defer k.Unlock()
	return slices.Clone(k.applied[key])
}

// Lists returns the queries of the lists so far.
func (k *KubernetesAPI) Lists() []url.Values {
	k.Lock()
	defer k.Unlock()
	return slices.Clone(k.lists)
}

// Watchers returns how many watches are open.
func (k *KubernetesAPI) Watchers() int {
	k.Lock()
	defer k.Unlock()
	return len(k.watchers)
}

// Kubeconfig writes a kubeconfig into dir and returns its path.
func (k *KubernetesAPI) Kubeconfig(dir string) string {
	path := filepath.Join(dir, "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: fake\ncontexts: [{name: fake, context: {cluster: fake, user: fake}}]\n"+
		"clusters: [{name: fake, cluster: {server: %q}}]\nusers: [{name: fake, user: {token: fake}}]\n", k.URL)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		k.unexpected("writing the kubeconfig: %v", err)
	}
	return path
}

func restartedAtOf(object map[string]any) string {
	at, _, _ := unstructured.NestedString(object, restartedAtPath...)
	return at
}

// clone returns a deep copy, with the types that JSON decodes to.
func clone(object map[string]any) map[string]any {
	text, err := json.Marshal(object)
	if err != nil {
		panic(err)
	}
	var copied map[string]any
	if err := utiljson.Unmarshal(text, &copied); err != nil { // whole numbers become int64
		panic(err)
	}
	return copied
}
