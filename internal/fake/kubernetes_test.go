package fake

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
)

// serve returns an API with a client for it, and what it found unexpected.
func serve(t *testing.T) (k *KubernetesAPI, client dynamic.ResourceInterface, unexpected *[]string) {
	t.Helper()
	unexpected = &[]string{}
	k = NewKubernetesAPI(func(format string, args ...any) { *unexpected = append(*unexpected, fmt.Sprintf(format, args...)) })
	t.Cleanup(k.Close)
	config, err := clientcmd.BuildConfigFromFlags("", k.Kubeconfig(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	all, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return k, all.Resource(schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}).Namespace("a"), unexpected
}

func names(list *unstructured.UnstructuredList) string {
	var all []string
	for _, item := range list.Items {
		all = append(all, item.GetName())
	}
	return strings.Join(all, " ")
}

func TestList(t *testing.T) {
	k, client, unexpected := serve(t)
	for _, key := range []string{"a/1", "a/2", "a/3", "b/4"} {
		k.Create(key, Spec{Image: "x"})
	}
	first, err := client.List(t.Context(), metav1.ListOptions{Limit: 2})
	if err != nil || names(first) != "1 2" {
		t.Fatalf("%v %v", first, err)
	}
	k.Create("a/5", Spec{Image: "x"}) // not part of the snapshot
	rest, err := client.List(t.Context(), metav1.ListOptions{Limit: 2, Continue: first.GetContinue()})
	if err != nil || names(rest) != "3" || rest.GetContinue() != "" || rest.GetResourceVersion() != first.GetResourceVersion() {
		t.Errorf("%v %v", rest, err)
	}
	one, err := client.List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=5"})
	if err != nil || names(one) != "5" || len(*unexpected) > 0 || len(k.Lists()) != 3 {
		t.Errorf("%v %v %q %v", one, err, *unexpected, k.Lists())
	}
	for _, o := range []metav1.ListOptions{{}, {Limit: 2, ResourceVersion: "0"}, {Limit: 2, LabelSelector: "x=y"}, {FieldSelector: "spec.x=y"}} {
		*unexpected = nil
		if client.List(t.Context(), o); len(*unexpected) != 1 {
			t.Errorf("%+v: %q", o, *unexpected)
		}
	}
	*unexpected = nil
	if _, err := client.Get(t.Context(), "1", metav1.GetOptions{}); !apierrors.IsBadRequest(err) || len(*unexpected) != 1 {
		t.Errorf("get: %v, %q", err, *unexpected)
	}
}

func TestPatch(t *testing.T) {
	k, client, unexpected := serve(t)
	k.Create("a/1", Spec{Image: "x"})
	patch := func(meta, at string) error {
		body := fmt.Sprintf(`{%s"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":%q}}}}}`, meta, at)
		_, err := client.Patch(t.Context(), "1", types.MergePatchType, []byte(body), metav1.PatchOptions{FieldManager: "me"})
		return err
	}
	u := &unstructured.Unstructured{Object: k.Object("a/1")}
	both := fmt.Sprintf(`"metadata":{"uid":%q,"resourceVersion":%q},`, u.GetUID(), u.GetResourceVersion())
	if err := patch(both, "T1"); err != nil || k.RestartedAt("a/1") != "T1" || len(*unexpected) > 0 {
		t.Fatalf("%v %q", err, *unexpected)
	}
	if err := patch(both, "T2"); !apierrors.IsConflict(err) {
		t.Errorf("an outdated version: %v", err)
	}
	err := patch(`"metadata":{"uid":"other"},`, "T2")
	if cause, ok := apierrors.StatusCause(err, metav1.CauseTypeFieldValueInvalid); !apierrors.IsInvalid(err) || !ok || cause.Field != "metadata.uid" {
		t.Errorf("another uid: %v", err)
	}
	before := k.Object("a/1")
	u = &unstructured.Unstructured{Object: before}
	fields := u.GetManagedFields()
	if err := patch("", "T1"); err != nil || u.GetResourceVersion() != (&unstructured.Unstructured{Object: k.Object("a/1")}).GetResourceVersion() {
		t.Errorf("a patch that changes nothing: %v", err)
	}
	if u.GetGeneration() != 2 || len(fields) != 2 || fields[1].Manager != "me" || time.Since(fields[1].Time.Time) > time.Minute || time.Since(fields[0].Time.Time) < time.Hour {
		t.Errorf("generation %d, managed by %+v", u.GetGeneration(), fields)
	}
	k.OnStore = func(object map[string]any) { unstructured.RemoveNestedField(object, restartedAtPath...) }
	if err := patch("", "T3"); err != nil || k.RestartedAt("a/1") != "" {
		t.Errorf("%v: restartedAt is %q", err, k.RestartedAt("a/1"))
	}
	if got := fmt.Sprint(k.Applied("a/1")); got != "[T1]" || len(*unexpected) > 0 || len(k.Patches("a/1")) != 5 {
		t.Errorf("applied %s of %v; %q", got, k.Patches(""), *unexpected)
	}
	for _, body := range []string{`{}`, `{"spec":{"replicas":0}}`, `{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"T","x":"y"}}}}}`,
		`{"metadata":{"labels":{}},"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"T"}}}}}`} {
		*unexpected = nil
		if _, err := client.Patch(t.Context(), "1", types.MergePatchType, []byte(body), metav1.PatchOptions{}); !apierrors.IsBadRequest(err) || len(*unexpected) != 1 {
			t.Errorf("%s: %v, %q", body, err, *unexpected)
		}
	}
}

func TestWatch(t *testing.T) {
	k, client, _ := serve(t)
	k.Create("a/1", Spec{Image: "x"})
	first, err := client.List(t.Context(), metav1.ListOptions{Limit: 2})
	if err != nil {
		t.Fatal(err)
	}
	watch := func() func() string {
		w, err := client.Watch(t.Context(), metav1.ListOptions{ResourceVersion: first.GetResourceVersion()})
		if err != nil {
			t.Fatal(err)
		}
		return func() string {
			e, ok := <-w.ResultChan()
			if u, object := e.Object.(*unstructured.Unstructured); ok && object {
				return fmt.Sprintf("%s %s %d", e.Type, u.GetName(), u.GetGeneration())
			}
			text, _ := json.Marshal(e.Object)
			return fmt.Sprintf("%s %s", e.Type, text)
		}
	}
	next := watch()
	k.Create("b/elsewhere", Spec{Image: "x"})
	k.ChangeUnseen(func() {
		k.Change("a/1", func(o map[string]any) { unstructured.SetNestedField(o, true, "spec", "paused") })
	})
	k.ChangeStatus("a/1", func(o map[string]any) { unstructured.SetNestedField(o, int64(2), "status", "observedGeneration") })
	if got := next(); got != "MODIFIED 1 2" {
		t.Errorf("first event %s", got)
	}
	k.EndWatches()
	if got := next(); got != " null" {
		t.Errorf("not ended: %s", got)
	}
	k.Lock()
	k.Lag = func() time.Duration { return 20 * time.Millisecond }
	k.Unlock()
	start := time.Now()
	next = watch()
	k.Delete("a/1")
	if got := next() + next() + next(); got != "MODIFIED 1 2MODIFIED 1 2DELETED 1 2" || time.Since(start) < 20*time.Millisecond {
		t.Errorf("from the same version: %s, after %s", got, time.Since(start))
	}
}
