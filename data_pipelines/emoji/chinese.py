"""The tiny worlds in Chinese: questions, answers, captions and instructions, by the rules of the English ones."""

from typing import Any

from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.scenes import POSITIONS, Layer, Scene, position_phrase, without_hyphens
from emma_train.errors import UserError

CONCEPT_WORDS = dict(
    pair.split("=")
    for line in (
        "grinning face=笑脸, angry face=生气脸, ghost=鬼, robot=机器人, skull=骷髅, alien=外星人, clown face=小丑",
        "red heart=红心, waving hand=挥手, thumbs up=点赞, flexed biceps=肌肉, victory hand=胜利手势, raised fist=拳头",
        "ear=耳朵, nose=鼻子, baby=婴儿, dog face=狗, cat face=猫, pig face=猪, frog=青蛙, penguin=企鹅, fish=鱼",
        "octopus=章鱼, turtle=乌龟, pizza=披萨, banana=香蕉, red apple=红苹果, strawberry=草莓, hamburger=汉堡",
        "carrot=胡萝卜, doughnut=甜甜圈, watermelon=西瓜, rocket=火箭, airplane=飞机, sailboat=帆船, sun=太阳",
        "house=房子, bicycle=自行车, umbrella=雨伞, rainbow=彩虹, soccer ball=足球, basketball=篮球, balloon=气球",
        "trophy=奖杯, wrapped gift=礼物, kite=风筝, christmas tree=圣诞树, teddy bear=泰迪熊, guitar=吉他, key=钥匙",
        "light bulb=灯泡, bell=铃铛, camera=相机, crown=皇冠, pencil=铅笔, magnet=磁铁, check mark=对号, plus=加号",
        "cross mark=叉号, up arrow=向上箭头, red question mark=红问号, yin yang=阴阳, peace symbol=和平符号",
        "recycling symbol=回收符号",
    )
    for pair in line.split(", ")
)
GROUP_WORDS = {
    "smileys & emotion": "表情与情感",
    "people & body": "人物与身体",
    "animals & nature": "动物与自然",
    "food & drink": "食物与饮料",
    "travel & places": "旅行与地点",
    "activities": "活动",
    "objects": "物品",
    "symbols": "符号",
}
STYLE_WORDS = {"flat": "扁平", "modern": "现代", "high contrast": "高对比"}
TONE_WORDS = {
    "default": "黄",
    "light": "浅",
    "medium-light": "中浅",
    "medium": "中等",
    "medium-dark": "中深",
    "dark": "深",
}
BACKGROUND_WORDS = {
    "white": "白色",
    "grey": "灰色",
    "yellow": "黄色",
    "orange": "橙色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
}
POSITION_WORDS = {
    "centre": "中间",
    "left": "左边",
    "right": "右边",
    "top": "上边",
    "bottom": "下边",
    "bottom left": "左下角",
    "bottom right": "右下角",
}
NUMBER_WORDS = {"one": "一个", "two": "两个", "three": "三个"}
CHINESE_QUESTIONS = {
    "concept": "这是什么",
    "style": "这是什么风格",
    "group": "这属于哪一类",
    "background": "背景是什么颜色",
    "place": "它在哪里",
    "word": "写了什么字",
    "count": "有几个图案",
    "caption": "描述这张图",
}
CHINESE_ANSWERS = {
    "concept": CONCEPT_WORDS,
    "at": CONCEPT_WORDS,
    "style": STYLE_WORDS,
    "group": GROUP_WORDS,
    "background": BACKGROUND_WORDS,
    "place": POSITION_WORDS,
    "count": NUMBER_WORDS,
    "stem": {"rising": "上升", "falling": "下降"},
}
"""Kind of question -> answers; what is not in it (a word, a number, a formula) stays as it is."""
CHINESE_STEM_QUESTIONS = {
    "What is the result?": "结果是多少",
    "What is the formula?": "公式是什么",
    "Which bar is highest?": "哪根柱子最高",
    "Which bar is lowest?": "哪根柱子最低",
    "Is the line rising or falling?": "线在上升还是下降",
}
AT_QUESTIONS = {f"What is {position_phrase(name)}?": f"{POSITION_WORDS[name]}是什么" for name in POSITIONS}
VALUE_QUESTION = "What is the value of "
KIND_END = " zh"
"""Added to the kind of a question, so that questions in Chinese are scored apart."""


def check_words(concepts: frozenset[str] | None) -> None:
    """Raise UserError where a world has concepts without a Chinese word."""
    if concepts is None or not concepts <= CONCEPT_WORDS.keys():
        raise UserError(
            "only the worlds tiny and tiny-scenes have Chinese words; take one of them, or leave out Chinese"
        )


def chinese_question(alternative: dict[str, Any]) -> dict[str, Any]:
    """An English i2t alternative of one question, in Chinese."""
    question, answer = (turn["text"] for turn in alternative["turns"])
    kind = alternative["kind"]
    text = CHINESE_ANSWERS.get(kind, {}).get(answer, answer)
    return _alternative(alternative["images"], _question(kind, question), text, kind)


def chinese_description(image: str, scene: Scene) -> dict[str, Any]:
    """An i2t alternative whose answer is the caption of an image."""
    return _alternative([image], CHINESE_QUESTIONS["caption"], chinese_caption(scene), "caption")


def chinese_caption(scene: Scene) -> str:
    """All of a scene."""
    ground = f"{BACKGROUND_WORDS[scene.background]}背景"
    if scene.is_single:
        (layer,) = scene.layers
        small = "小" if layer.is_small else ""
        position = "" if layer.position == "centre" else f",在{POSITION_WORDS[layer.position]}"
        return f"{ground}上的一个{small}{_styled(layer.drawing)}{position}"
    parts = [f"{POSITION_WORDS[layer.position]}是{_styled(layer.drawing)}" for layer in scene.layers]
    word = [f"写着{scene.word}"] if scene.word else []
    return ",".join([ground, *parts, *word])


def chinese_instruction(kind: str, source: Scene, target: Scene) -> str:
    """The edit of a kind that makes the target of the source."""
    gone, new = _different(source, target), _different(target, source)
    if kind == "background":
        return f"把背景改成{BACKGROUND_WORDS[target.background]}"
    if kind == "text":
        written = f"把文字改成{target.word}" if source.word else f"写上{target.word}"
        return written if target.word else "去掉文字"
    if kind == "add":
        return f"在{POSITION_WORDS[new[0].position]}加一个{_name(new[0].drawing)}"
    if kind == "remove":
        return f"去掉{_name(gone[0].drawing)}"
    old, now = gone[0].drawing, new[0].drawing
    if kind == "recolour":
        return f"把{CONCEPT_WORDS[now.concept]}的肤色改成{TONE_WORDS[now.tone or 'default']}"
    if kind == "style":
        return f"改成{STYLE_WORDS[without_hyphens(now.style)]}风格"
    return f"把{_name(old)}换成{_name(now)}"


def _alternative(images: list[str], question: str, answer: str, kind: str) -> dict[str, Any]:
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"images": images, "turns": turns, "kind": f"{kind}{KIND_END}"}


def _question(kind: str, question: str) -> str:
    if question.startswith(VALUE_QUESTION):
        return f"{question.removeprefix(VALUE_QUESTION).removesuffix('?')}的值是多少"
    if kind == "stem":
        return CHINESE_STEM_QUESTIONS[question]
    return AT_QUESTIONS[question] if kind == "at" else CHINESE_QUESTIONS[kind]


def _different(scene: Scene, other: Scene) -> list[Layer]:
    return [layer for layer in scene.layers if layer not in other.layers]


def _styled(drawing: Drawing) -> str:
    return f"{STYLE_WORDS[without_hyphens(drawing.style)]}风格的{_name(drawing)}"


def _name(drawing: Drawing) -> str:
    """The yellow default tone is not mentioned, as in English."""
    tone = "" if drawing.tone in (None, "default") else f"{TONE_WORDS[drawing.tone or '']}肤色的"
    return f"{tone}{CONCEPT_WORDS[drawing.concept]}"
